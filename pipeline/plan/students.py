"""Folders of weights before any is made: students, what a comparison trains, and checkpoints on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...hub import count_parameters, load_config
from ...store.dtypes import dtype_of
from ...train.settings import ByteLevelBPE
from ..run import Run

_STATES: Final = 3
"""A checkpoint, in weights: these, and the optimiser's two moments of each."""


@dataclass(frozen=True)
class PlannedWeights:
    """Weights that the recipe asks for."""

    label: str
    path: Path
    bytes: int


def planned_students(run: Run) -> list[PlannedWeights]:
    """What a run writes beside its stores. Tokenizers and logs, and adapters and their checkpoints, are not counted.

    Of checkpoints there are those of one training at a time: the last one, and the one that takes its place.

    Raises:
        KavaError: if the student's model or tokenizer cannot be reached.
    """
    settings, train, compare = run.recipe.student, run.recipe.train, run.recipe.compare
    itemsize = dtype_of(settings.dtype).itemsize
    weights = itemsize * count_parameters(_config(run))
    found = [PlannedWeights("student", run.student_dir, weights), PlannedWeights("train", run.trained_dir(), weights)]
    if compare is not None:
        count = len(compare.arms) * len(compare.seeds)
        found.append(PlannedWeights(f"compare, {count} trainings", run.compare_dir, count * weights))
    if train.save_steps is not None and train.save_steps <= train.max_steps and train.lora is None:
        at_once = min(2, train.max_steps // train.save_steps)
        path = run.trained_dir() / "checkpoints"
        found.append(PlannedWeights("checkpoints", path, at_once * _STATES * weights))
    return found


def _config(run: Run) -> Any:
    """The student's, with as many tokens as its tokenizer will have; at most, where that is trained on the corpus."""
    from ...train.student import model_source, student_config, student_tokenizer

    settings = run.recipe.student
    if run.has_student:
        return load_config(run.student_source)
    if settings.model is not None:
        return load_config(model_source(settings))
    config = student_config(settings, None)
    if isinstance(settings.tokenizer, ByteLevelBPE):
        config.vocab_size = settings.tokenizer.vocab_size
    else:
        config.vocab_size = len(student_tokenizer(settings, ()))
    return config
