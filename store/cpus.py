"""How many processors this process may use."""

from __future__ import annotations

import os


def num_cpus() -> int:
    """Those that it was given: a batch job, or one of several ranks, has its share of the machine's."""
    if hasattr(os, "sched_getaffinity"):  # Not on macOS.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
