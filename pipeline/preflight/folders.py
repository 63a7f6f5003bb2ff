"""Preflight checks of the folders that a run writes to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...store.files import disk_errors
from .scope import Scope, is_read_only


def check_folders(scope: Scope) -> Iterator[str]:
    """Yield folders of the recipe in which nothing can be written, unless nothing is left to be written."""
    recipe = scope.run.recipe
    if scope.corpus is None:  # What is left to be written cannot be told.
        return
    folders = {"run_dir": scope.run.root}
    if recipe.store_dir is not None and any(scope.runs_teacher(name) for name in recipe.teachers):
        folders["store_dir"] = Path(recipe.store_dir).expanduser()
    for key, folder in folders.items():
        if (is_read_only(folder) and scope.writes()) or not folder.is_dir():
            yield from scope.problems_of(partial(_try_to_write, folder), key=key)


def _try_to_write(folder: Path) -> None:
    """Create and remove a folder in the nearest existing parent: rights alone do not tell what root can write.

    Raises:
        StoreError: if that is impossible.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix=".kava-", dir=existing):
        pass
