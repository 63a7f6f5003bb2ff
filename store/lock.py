"""One process at a time, on this machine or on others that see the same files.

A lock saves work, it does not guard anything: what is made under one gets a name of its own and is renamed when it is
whole, so where a file system knows no locks two processes make the same bytes, and one of them in vain. The kernel
lets go of a lock when its holder dies; one that hangs is waited for `PATIENCE` seconds. Whoever reads or writes samples
touches its locks (`at_work`), so that one that is only slow is waited for as long as it takes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from ..errors import KavaError
from .files import disk_errors, make_folder

T = TypeVar("T")
PATIENCE: Final = 600.0
"""Seconds without a sign of work after which a lock is done without.

Its holder's machine may hang, or be gone with a file server's lock.
"""
_HELD: Final[set[Path]] = set()
_signs: float = 0.0
_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of the file `path`, which is there while somebody holds it or waits for it.

    Args:
        path: of the lock.
        on_wait: called once if another process holds it.
    """
    lock = Lock.take(path)
    if lock is None:
        on_wait()
        lock = Lock.take(path, wait=True)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


class Lock:
    """A lock that is held, from any thread; or one that was waited for too long, and is done without."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path, self._descriptor = path, descriptor
        if descriptor is not None:
            _HELD.add(path)

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> Lock | None:
        """The lock of the file `path`; None if another holds it and `wait` is not set."""
        began, pause, seen = time.monotonic(), 0.01, None
        while True:
            try:
                with disk_errors(path):
                    return cls(path, _try(path))
            except _HeldError:
                if not wait:
                    return None
            # By the clock of this machine: how old the sign is, only the file server could say.
            if (sign := _sign(path)) != seen:
                began, seen = time.monotonic(), sign
            if time.monotonic() - began > PATIENCE:
                return cls(path, None)
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def release(self) -> None:
        """Lets go of it."""
        if self._descriptor is None:
            return
        _HELD.discard(self._path)
        with suppress(OSError):  # In this order: once it is let go of, it may be another's.
            self._path.unlink()
        os.close(self._descriptor)


def at_work() -> None:
    """Tells whoever waits for a lock of this process that it is at work; cheap enough for every sample."""
    global _signs
    if not _HELD or time.monotonic() - _signs < PATIENCE / 20:
        return
    _signs = time.monotonic()
    for path in tuple(_HELD):
        with suppress(OSError):  # It was let go of meanwhile.
            os.utime(path)


def _sign(path: Path) -> tuple[int, int] | None:
    """What changes when the lock of `path` is touched, or is another process's."""
    try:
        there = path.stat()
    except OSError:
        return None
    return there.st_ino, there.st_mtime_ns


class _HeldError(KavaError):
    """Another process holds it."""


def _try(path: Path) -> int:
    make_folder(path.parent)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise _HeldError from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # Its holder removed it between opening and locking; the next one has another file.


def claimed(items: Iterable[T], take: Callable[[T, bool], Lock | None]) -> Iterator[tuple[T, Lock]]:
    """Every item with its lock; those that other processes hold come last, when they let go of them.

    Args:
        items: what there is to do, perhaps done meanwhile by those others.
        take: the lock of an item; told whether to wait for it.
    """
    busy = list(items)
    for wait in (False, True):
        busy, now = [], busy
        for item in now:
            lock = take(item, wait)
            if lock is None:
                busy.append(item)
            else:
                yield item, lock


def _is_at(descriptor: int, path: Path) -> bool:
    mine = os.fstat(descriptor)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
