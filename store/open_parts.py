"""The parts that a store keeps open: the most recently used ones, bounded by their memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from .part_reader import PartReader

OPEN_BYTES: Final = 64 << 20
"""Memory of the parts that stay open: a few thousand small ones; the last one in any case."""

_LOCK: Final = threading.Lock()
"""Held while the table of open parts of any store changes, which takes microseconds."""

# A process that is forked while another thread holds the lock would wait for it forever.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


class OpenParts:
    """Cache of part readers, safe to use from several threads."""

    def __init__(self) -> None:
        self._parts: OrderedDict[int, PartReader] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._parts)

    def get(self, number: int, open_part: Callable[[], PartReader]) -> PartReader:
        """Return the reader of part `number`, opened by `open_part` if it is not open."""
        with _LOCK:
            if (part := self._parts.get(number)) is not None:
                self._parts.move_to_end(number)
                return part
        opened = open_part()
        with _LOCK:
            if (part := self._parts.get(number)) is not None:  # Another thread was faster: all use its reader.
                return part
            self._parts[number] = opened
            self._nbytes += opened.nbytes
            while self._nbytes > OPEN_BYTES and len(self._parts) > 1:
                self._nbytes -= self._parts.popitem(last=False)[1].nbytes
            return opened

    def forget(self, number: int) -> None:
        """Drop the reader of a part that is removed or replaced."""
        with _LOCK:
            if (part := self._parts.pop(number, None)) is not None:
                self._nbytes -= part.nbytes
