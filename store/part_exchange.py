"""Replacement of single parts of a store: the old part is removed when the new one is complete, not before.

A part that is to be captured again stays readable until then (`replace_part`). An outdated part, which was made from
something that is another one now, must not be taken for good by whatever reads the store meanwhile: it is hidden, and
put back if the new one cannot be made (`replacing_outdated`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StoreError
from .files import disk_errors, fsync, remove
from .leftovers import AGAIN
from .lock import locked
from .maker import hold, mark
from .manifest import Manifest
from .part import part_name
from .replace import exchange
from .store import OUTDATED, KVStore


def replace_part(store: KVStore, index: int, new: Path) -> None:
    """Put a part that was written elsewhere on the same file system in the place of part `index` of a store.

    A reader sees the old part or the new one.
    """
    store.forget(index)
    with disk_errors(store.path):
        final = store.path / "parts" / part_name(index)
        doomed = store.path / "parts" / f".drop-{part_name(index)}"
        remove(doomed)
        if not os.path.lexists(final):
            new.rename(final)
        elif exchange(final, new):
            new.rename(doomed)
        else:
            final.rename(doomed)
            new.rename(final)
        fsync(final.parent)
        remove(doomed)


def manifest_at(path: Path) -> Manifest | None:
    """Return the manifest of the store at a path; None if there is none that can be read."""
    try:
        return KVStore.open(path).manifest
    except StoreError:
        return None


def has_parts(path: Path) -> bool:
    """Return whether the store at a path has parts, or a process is at one."""
    return any((path / "parts").glob("[0-9]*")) or any((path / "parts").glob(".*-*"))


@contextmanager
def removed_if_empty(path: Path) -> Iterator[None]:
    """Remove the store at a path if what is done inside fails before it has a part."""
    try:
        yield
    except BaseException:
        if not has_parts(path):
            remove(path)
        raise


@contextmanager
def scratch_store(store: KVStore, parts: Collection[int]) -> Iterator[Path]:
    """Yield a folder inside a store in which these parts are to be rebuilt, as a store with the same manifest.

    Afterwards each takes the place of the part of the same number. If they could not be rebuilt, nothing changes.
    """
    folder = store.path.resolve() / "parts" / f"{AGAIN}{mark()}"
    lock = hold(folder)
    try:
        yield folder
        for part in sorted(parts):
            replace_part(store, part, folder / "parts" / part_name(part))
    finally:
        remove(folder)
        lock.release()


@contextmanager
def replacing_outdated(
    store: KVStore, outdated: Callable[[], Collection[int]], parts: Collection[int]
) -> Iterator[None]:
    """Hide outdated parts, which are to be written again inside; put back those that were not.

    Args:
        store: the store.
        outdated: returns the numbers of all outdated parts; called while no other process hides any.
        parts: the parts that this process writes. Those that other processes have hidden are left to them: put back
            before its turn came, a part would be taken for one that is written again.
    """
    try:
        with locked(store.path / "parts" / ".outdated.lock"):
            for index in sorted(set(outdated()) & set(parts)):
                _hide(store, index)
        yield
    finally:
        _restore(store, parts)
        store.remove_set_aside()


def _hide(store: KVStore, index: int) -> None:
    store.forget(index)
    with disk_errors(store.path):
        hidden = store.path / "parts" / f"{OUTDATED}{part_name(index)}"
        remove(hidden)
        (store.path / "parts" / part_name(index)).rename(hidden)


def _restore(store: KVStore, parts: Collection[int]) -> None:
    """Put those hidden parts back that were not written again and that no process is writing."""
    for index in set(store.parts_named(OUTDATED)) & set(parts) - set(store.committed_parts()):
        claim = store.claim(index)
        if claim is None:
            continue
        try:
            hidden = store.path / "parts" / f"{OUTDATED}{part_name(index)}"
            if not store.holds(index) and os.path.lexists(hidden):
                with disk_errors(store.path):
                    hidden.rename(store.path / "parts" / part_name(index))
        finally:
            claim.release()
