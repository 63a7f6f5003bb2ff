"""Scratch memory that each thread keeps: reading page after page allocates nothing."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

_kept = threading.local()


def scratch(use: str, nbytes: int) -> np.ndarray[Any, Any]:
    """`[nbytes]` uint8, with any content; the same memory at this thread's next call for the same use."""
    found: np.ndarray[Any, Any] | None = getattr(_kept, use, None)
    if found is None or len(found) < nbytes:
        found = np.empty(nbytes, np.uint8)
        setattr(_kept, use, found)
    return found[:nbytes]
