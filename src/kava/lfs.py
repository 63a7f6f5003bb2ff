"""Git LFS pointers: the small text files that a clone without Git LFS leaves in the place of large ones.

Every reader calls such a file damaged, and copying it again does not help.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

_BEGIN: Final = b"version https://git-lfs.github.com/spec/"


def lfs_pointer(path: Path) -> str | None:
    """Return what to say of a file that is a Git LFS pointer; None if it is not one, or cannot be read.

    The line states the fault and the remedy, without the name of the file.
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_BEGIN)) == _BEGIN:
            return "it is a Git LFS pointer, not the file itself. Download it with git lfs pull"
    return None
