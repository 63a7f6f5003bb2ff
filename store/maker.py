"""Writers of unfinished files and folders: a mark in the name, and a lock beside it that its writer holds.

The lock decides whether the writer is alive: it also tells of a writer in another container or PID namespace, whose
process id means nothing here. Host, process id and birth, which the mark holds, decide only where there is no lock file
or the file system has no locks.
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from pathlib import Path

from .lock import Lock, is_held


def mark() -> str:
    """`HOST-PID-BIRTH-RANDOM` of this process, for a name that no other will give."""
    pid = os.getpid()
    return f"{socket.gethostname()}-{pid}-{_birth(pid)}-{uuid.uuid4().hex[:8]}"


def is_gone(mark: str) -> bool:
    """Whether a mark is of a process of this host that is there no more; of another host's, nothing is known.

    Linux gives an id again after some tens of thousands of processes, and to threads too: who has it now is the maker
    only if it was born in the same tick of the system's clock since boot.
    """
    found = re.fullmatch(r"(.+)-(\d+)-(\d+)-[0-9a-f]+", mark)
    if found is None or found[1] != socket.gethostname():
        return False
    try:
        os.kill(int(found[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # Another user's, of which nothing more may be known.
        return False
    return _birth(int(found[2])) not in (found[3], "0")


def _birth(pid: int) -> str:
    """Clock ticks from boot to the start of a process or thread; 0 if it cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return fields[19]


def hold(path: Path) -> Lock:
    """Take the lock of a hidden path before it is created; release it when the path is renamed or removed.

    Args:
        path: a path with a `mark()` in its name.
    """
    lock = Lock.take(lock_of(path), wait=True)
    assert lock is not None
    return lock


def lock_of(path: Path) -> Path:
    """Return the lock file of a hidden path: beside it, so that the path itself holds nothing else."""
    return path.with_name(f"{path.name}.lock")


def is_abandoned(path: Path, mark: str, *, any_host: bool = False) -> bool:
    """Return whether nobody writes a hidden path any more, so that it may be removed.

    Args:
        path: the path that was given to `hold`.
        mark: the `mark()` in its name.
        any_host: whether to believe the lock of a writer on a host with another name. A file system may keep locks
            to one host, so a command believes it only when a user asks for repair.
    """
    held = is_held(lock_of(path))
    if held is None:
        return is_gone(mark)
    return not held and (any_host or host_of(mark) == socket.gethostname())


def host_of(mark: str) -> str | None:
    """Return the name of the host in a mark; None if it is no mark."""
    parsed = re.fullmatch(r"(.+)-(\d+)-(\d+)-[0-9a-f]+", mark)
    return None if parsed is None else parsed[1]
