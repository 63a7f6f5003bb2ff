"""The recipe's teachers, loaded or started: for capture, and for writing text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..extract import Teacher
from ..extract.generate import Writer
from .run import Run

if TYPE_CHECKING:
    from ..extract.hf import HFTeacher
    from ..extract.vllm.teacher import VLLMTeacher


def open_teacher(run: Run, name: str) -> Teacher:
    """A teacher of the recipe, on the backend that the recipe names.

    Raises:
        KavaError: if it cannot be loaded or started.
    """
    return _open(run, name, decoding=False)


def open_writer(run: Run, name: str) -> Writer:
    """The same, for writing text.

    Raises:
        KavaError: if it cannot be loaded or started.
    """
    return _open(run, name, decoding=True)


def _open(run: Run, name: str, *, decoding: bool) -> HFTeacher | VLLMTeacher:
    recipe, settings, source = run.recipe, run.teacher(name), run.teacher_source(name)
    if recipe.extract.backend == "vllm":
        from ..extract.vllm.teacher import VLLMTeacher

        return VLLMTeacher(
            source,
            dtype=settings.dtype,
            output_dtype=recipe.extract.dtype,
            settings=settings.engine,
            batch_tokens=recipe.extract.batch_tokens,
            decoding=decoding,
        )
    from ..extract.hf import HFTeacher

    return HFTeacher.load(
        source,
        dtype=settings.dtype,
        device=settings.device,
        batch_tokens=recipe.extract.batch_tokens,
        importance=recipe.extract.importance and not decoding,
        confidence=recipe.extract.confidence and not decoding,
        logits=None if decoding else recipe.extract.logits,
    )
