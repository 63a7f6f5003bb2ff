"""Replacement of an output by a new one that was built beside it.

The new output is built at `next_path(path)`, a hidden sibling of `path`, and the two are exchanged once it is complete.
Readers therefore see the old output or the new one, never neither. A note beside them, `.NAME.replacing`, records the
inode of the new output while they are exchanged: after a kill, `settle` knows by it which of the two is which.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any, Final

from .files import disk_errors, fsync, remove, write_atomic

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_NO_EXCHANGE: Final = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of a kernel or a file system that cannot exchange two names."""


def next_path(path: Path) -> Path:
    """Return where the replacement of `path` is built: a hidden sibling on the same file system."""
    return path.with_name(f".{path.name}.next")


def discarded_path(path: Path) -> Path:
    """Return where the old output lies from the exchange until it is removed."""
    return path.with_name(f".{path.name}.discarded")


def note_path(path: Path) -> Path:
    """Return the note that exists while `path` is exchanged."""
    return path.with_name(f".{path.name}.replacing")


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once; return False, with nothing changed, where the file system cannot.

    Args:
        first: an existing file, folder or link.
        second: another one on the same file system.

    Raises:
        OSError: if one of them does not exist or must not be renamed.
    """
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def replace_with(path: Path, new: Path) -> None:
    """Put the complete output `new` in the place of `path`, then remove the old one.

    Args:
        path: the output; need not exist.
        new: `next_path(path)`.

    Raises:
        RetryLaterError: if the disk is full or failing.
        StoreError: if the folder cannot be written.
    """
    with disk_errors(path):
        if os.path.lexists(path):
            write_atomic(note_path(path), str(new.lstat().st_ino).encode())
            remove(discarded_path(path))
            if not exchange(path, new):
                path.rename(discarded_path(path))
                new.rename(path)
            fsync(path.parent)
            settle(path)
        else:
            new.rename(path)
            fsync(path.parent)


def settle(path: Path) -> None:
    """Complete the exchange of `path` that a kill interrupted, and remove what it replaced."""
    note = note_path(path)
    try:
        number = int(note.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        number = -1
    with disk_errors(path):
        new = next_path(path)
        if not os.path.lexists(path) and os.path.lexists(new):
            new.rename(path)  # Between two renames, where names cannot be exchanged.
        elif os.path.lexists(new) and os.path.lexists(path) and path.lstat().st_ino == number:
            remove(discarded_path(path))
            new.rename(discarded_path(path))
        # Without its note, what is still called next is a rebuild that goes on.
        note.unlink(missing_ok=True)
        fsync(path.parent)
        remove(discarded_path(path))


@cache
def _renameat2() -> Any:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function
