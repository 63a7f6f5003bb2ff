"""Who makes what is not finished yet: a mark in its name, by which what a dead process left is found."""

from __future__ import annotations

import os
import re
import socket
import uuid
from pathlib import Path


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
