"""One process at a time, on this machine or on others that see the same files.

A lock saves work, it does not guard anything: what is made under one gets a name of its own and is renamed when it is
whole, so where a file system knows no locks two processes make the same bytes, and one of them in vain. The kernel
lets go of a lock when its holder dies; one that hangs is waited for `PATIENCE` seconds.
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
from .files import disk_errors

T = TypeVar("T")
PATIENCE: Final = 600.0
"""Seconds after which a lock is done without: its holder's machine may hang, or be gone with a file server's lock."""
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

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> Lock | None:
        """The lock of the file `path`; None if another holds it and `wait` is not set."""
        began, pause = time.monotonic(), 0.01
        while True:
            try:
                with disk_errors(path):
                    return cls(path, _try(path))
            except _HeldError:
                if not wait:
                    return None
            if time.monotonic() - began > PATIENCE:
                return cls(path, None)
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def release(self) -> None:
        """Lets go of it."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # In this order: once it is let go of, it may be another's.
            self._path.unlink()
        os.close(self._descriptor)


class _HeldError(KavaError):
    """Another process holds it."""


def _try(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
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
