"""The resolved recipe beside a run's outputs: `run_dir/recipe.yaml`, where `kava inspect --align` finds it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import KavaError
from ..store.files import is_writable
from .found_recipe import NAME
from .run import Run
from .stage import Stage


def save_recipe(run: Run) -> None:
    """Save the recipe in the run's folder, unless there is none or nothing can be written in it."""
    if is_writable(run.root):
        run.recipe.save(run.root / NAME)


@contextmanager
def recipe_saved(run: Run) -> Iterator[Callable[[Stage], None]]:
    """Save the recipe after the block if a stage has written something in it, also if the block fails.

    Yields:
        A function to call with each stage that is going to write; `on_make` of `run_stages`.
    """
    attempted: list[Stage] = []

    def is_written() -> bool:
        return any(os.path.lexists(stage.building) for stage in attempted)

    try:
        yield attempted.append
    except BaseException:
        with suppress(KavaError, OSError):  # The first error is the one to report.
            if is_written():
                save_recipe(run)
        raise
    if is_written():
        save_recipe(run)
