"""What killed processes leave behind: hidden files and folders beside an output and inside a store.

A leftover is removed once nobody writes it any more, which its lock decides (see `maker`). One whose writer ran on a
host with another name is removed only where `any_host` is set, that is by `kava repair`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from .files import disk_errors, remove
from .lock import Lock, is_held
from .maker import host_of, is_abandoned, lock_of
from .replace import discarded_path, next_path, note_path, settle

AGAIN: Final = ".again-"
"""Prefix of a store inside `parts/` in which some parts of the store are rebuilt, followed by a mark."""

Use = Literal["abandoned", "in use", "unknown"]


@dataclass(frozen=True)
class Leftover:
    """A hidden file or folder that no reader sees."""

    path: Path
    kind: str
    """Description for people."""
    use: Use
    """`unknown`: its writer ran on another host, and the file system has no lock of it."""

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        if not self.path.is_dir() or self.path.is_symlink():
            with suppress(OSError):
                return self.path.lstat().st_size
            return 0
        total = 0
        for folder, _, files in os.walk(self.path):
            for name in files:
                with suppress(OSError):
                    total += (Path(folder) / name).lstat().st_size
        return total


def leftovers_of(output: Path) -> list[Leftover]:
    """Return everything that lies beside an output, or inside the store that it is."""
    return [*_beside(output), *_inside(output)]


def remove_leftovers(root: Path, *, any_host: bool = False) -> None:
    """Remove what dead writers left inside the store at `root`.

    Args:
        root: the folder of a store.
        any_host: whether to remove what a writer on a host with another name left; see `is_abandoned`.
    """
    for leftover in _inside(root, any_host=any_host):
        if leftover.use == "abandoned":
            remove_leftover(leftover)


def remove_leftover(leftover: Leftover) -> None:
    """Remove a leftover, and the lock beside it."""
    with suppress(OSError):  # Another process may be removing it.
        remove(leftover.path)
    if lock_of(leftover.path).exists() and (lock := Lock.take(lock_of(leftover.path))) is not None:
        lock.release()


def builders_path(output: Path, mark: str) -> Path:
    """Return the path that one of the processes that write `next_path(output)` holds; see `hold`."""
    return output.with_name(f".{output.name}.next-{mark}")


def is_being_built(output: Path) -> bool:
    """Return whether a process writes `next_path(output)`."""
    locks = output.parent.glob(f".{_escaped(output.name)}.next-*.lock")
    return any(is_held(lock) for lock in locks)


def remove_temporary(output: Path) -> None:
    """Remove folders beside `output` that dead processes of this host were writing before they gave them its name."""
    for leftover in _beside(output, any_host=False):
        if leftover.use == "abandoned" and leftover.path not in (next_path(output), discarded_path(output)):
            remove_leftover(leftover)


def remove_beside(output: Path) -> None:
    """Remove what is left of exchanges of `output` that were interrupted, and locks of dead processes."""
    settle(output)
    if os.path.lexists(discarded_path(output)):  # On read-only media even removing nothing is an error.
        with disk_errors(output):
            remove(discarded_path(output))
    for lock in output.parent.glob(f".{_escaped(output.name)}.next-*.lock"):
        if (taken := Lock.take(lock)) is not None:
            taken.release()


def _beside(output: Path, *, any_host: bool = True) -> Iterator[Leftover]:
    building: Use = "in use" if is_being_built(output) else "abandoned"
    if os.path.lexists(next_path(output)):
        kind = "being exchanged with the output" if note_path(output).exists() else "an unfinished rebuild"
        yield Leftover(next_path(output), kind, building)
    if os.path.lexists(discarded_path(output)):
        yield Leftover(discarded_path(output), "an output that was replaced", "abandoned")
    for name in (output.name, next_path(output).name):
        for path in output.parent.glob(f".tmp-{_escaped(name)}-*"):
            mark = path.name.removeprefix(f".tmp-{name}-")
            if host_of(mark) is not None:
                yield Leftover(path, *_written_by(path, mark, any_host=any_host))


def _inside(root: Path, *, any_host: bool = True) -> Iterator[Leftover]:
    parts = root / "parts"
    for path in sorted(parts.glob(".tmp-*-*")):
        mark = path.name.split("-", 2)[2]
        if host_of(mark) is not None:
            yield Leftover(path, *_written_by(path, mark, any_host=any_host))
    for path in sorted(parts.glob(f"{AGAIN}*")):
        mark = path.name.removeprefix(AGAIN)
        if host_of(mark) is not None:
            yield Leftover(path, *_written_by(path, mark, any_host=any_host))
    for path in sorted(parts.glob(".drop-*")):
        yield Leftover(path, "a part that was replaced", "abandoned")
    for path in sorted(parts.glob(".claim-*")):
        yield Leftover(path, "a claim on a part", "in use" if is_held(path) else "abandoned")
    for lock in sorted(parts.glob(".*.lock")):
        if not lock.with_suffix("").exists() and not is_held(lock):
            yield Leftover(lock, "a lock that nobody holds", "abandoned")


def _written_by(path: Path, mark: str, *, any_host: bool) -> tuple[str, Use]:
    kind = f"unfinished, written by {host_of(mark)}"
    if is_abandoned(path, mark, any_host=any_host):
        return kind, "abandoned"
    return kind, "unknown" if is_held(lock_of(path)) is None else "in use"


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
