"""Preflight checks of packages that only some recipes need: kava's extras."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ...errors import ModelNotFoundError
from ...extract.vllm.compat import installed_version
from ...hub import ModelSource, find_model
from ..parallel import check_scheduler
from .scope import Scope


def check_extras(scope: Scope) -> Iterator[str]:
    """Yield packages that this recipe needs on this machine and that are not installed."""
    recipe = scope.run.recipe
    if recipe.extract.backend == "vllm" and any(scope.runs_teacher(name) for name in recipe.teachers):
        yield from scope.problems_of(installed_version)
    yield from scope.problems_of(lambda: check_scheduler(scope.scheduler))
    models = {f"teachers.{n}.model": t.model for n, t in recipe.teachers.items() if scope.needs_teacher(n)}
    if not scope.has_student:
        models["student.model"] = recipe.student.model or ""
        models["student.tokenizer"] = recipe.student.tokenizer if isinstance(recipe.student.tokenizer, str) else ""
    for key, name in models.items():
        try:
            source = find_model(name) if name else None
        except ModelNotFoundError:  # Reported by the checks of models.
            continue
        if source is not None:
            yield from _missing_readers(key, source)


def _missing_readers(key: str, source: ModelSource) -> Iterator[str]:
    if source.gguf_file and find_spec("gguf") is None:
        yield f"{key}: {source.name!r} is a GGUF file, and gguf is not installed: pip install 'kava[gguf]'"
    folder = Path(source.location)
    if not source.gguf_file and (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").exists():
        for package in ("sentencepiece", "google.protobuf"):
            if not _is_installed(package):
                yield (
                    f"{key}: {source.name!r} has a tokenizer.model and no tokenizer.json, and {package} is not "
                    "installed: pip install 'kava[sentencepiece]'"
                )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # Its parent package is missing.
        return False
