"""Preflight checks of the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ...errors import DamagedStoreError, StageError
from ...store import Split
from ..segments import refuse_empty_segments
from .scope import Scope


def check_corpus(scope: Scope) -> Iterator[str]:
    """Yield why the corpus cannot be read, or not be used for what the recipe asks for."""
    recipe = scope.run.recipe
    yield from scope.problems_of(lambda: scope.run.prompts)
    if scope.corpus is None:
        return
    if not scope.corpus.split(Split.TRAIN):
        yield f"corpus {recipe.corpus.label}: every sample is held out, none is left to train on"
    try:
        _ = scope.run.corpus
    except (StageError, DamagedStoreError):  # A teacher writes it first; the stage that wrote it reports damage.
        return
    yield from scope.problems_of(partial(refuse_empty_segments, scope.run))
