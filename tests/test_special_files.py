"""A named pipe in the place of any file of a run: no command waits for it, and none ends in a traceback."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, write_recipe

COMMANDS = (["status"], ["report", "--no-projection"], ["run", "--dry-run"], ["compare", "--no-train"])
SECONDS = 60


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """Of a run with an evaluated student."""
    path: Path = write_recipe(tmp_path_factory.mktemp("special"), tiny_models, train={"max_steps": 2})
    kava("run", path)
    kava("evaluate", path, "--no-generate")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """Of a run with two teachers, fused targets that are not written, a comparison, and an evaluation."""
    root = tmp_path_factory.mktemp("whole")
    teacher: dict[str, Any] = {"model": str(tiny_models["teacher"]), "dtype": "float32"}
    path: Path = write_recipe(
        root,
        tiny_models,
        teachers={"big": teacher, "other": teacher | {"dtype": "bfloat16"}},
        fuse={"name": "both", "weights": "fixed", "materialize": False},
        compare={"arms": ["none", "kv"], "seeds": [0]},
        train={"max_steps": 2},
    )
    kava("run", path)
    kava("compare", path)
    kava("evaluate", path, "--no-generate")
    return path


@contextmanager
def _pipe(path: Path) -> Iterator[None]:
    kept = path.with_name(f"{path.name}.kept")
    path.rename(kept)
    os.mkfifo(path)
    try:
        yield
    finally:
        path.unlink()
        kept.rename(path)


def _run(words: list[Any]) -> str:
    """What a command prints, whatever its exit code; a traceback or a hang is a failure."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    try:
        for code in (0, 1, 2):
            try:
                printed: str = kava(*words, code=code)
                return printed
            except AssertionError as error:
                last = error
        raise last
    finally:
        signal.alarm(0)


def _hangs(*_: Any) -> None:
    raise TimeoutError(f"no answer within {SECONDS} s")


def _try(recipe: Path, path: Path, commands: Sequence[list[str]]) -> None:
    with _pipe(path):
        printed = "".join(_run([words[0], recipe, *words[1:]]) for words in commands)
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    "name",
    [
        "student/kava.json",
        "student/config.json",
        "students/*/kava.json",
        "students/*/evaluate.json",
        "students/*/metrics.jsonl",
        "projectors/big.json",
        "targets/big.zarr/zarr.json",
    ],
)
def test_a_pipe_in_the_place_of_a_record(recipe: Path, name: str) -> None:
    (path,) = recipe.parent.glob(f"run/{name}")
    _try(recipe, path, COMMANDS[:2])


def test_a_pipe_in_the_place_of_a_projector(recipe: Path) -> None:
    with _pipe(recipe.parent / "run/projectors/big.safetensors"):
        shutil.rmtree(recipe.parent / "run/targets/big.zarr/parts/00000")
        assert "big.safetensors: damaged: it is not a regular file" in _run(["project", recipe, "--teacher", "big"])
    kava("project", recipe, "--teacher", "big")


@pytest.mark.slow
def test_a_pipe_in_the_place_of_any_file(whole: Path) -> None:
    files = [path for path in (whole.parent / "run").rglob("*") if path.is_file() and "/parts/0000" not in str(path)]
    assert len(files) > 40
    for path in files:
        _try(whole, path, COMMANDS)
