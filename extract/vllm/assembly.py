"""Puts samples together from the pieces that workers send, and hands each over when every number of it is there."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from ...errors import CaptureError, RetryLaterError
from ...store import KVGeometry
from ..teacher import Captured
from .handover import Flushed, Lost, Piece

READY_BYTES: Final = 256 << 20
"""Bytes of complete samples that may wait before workers have to."""


@dataclass
class _Sample:
    keys: torch.Tensor
    values: torch.Tensor
    seen: np.ndarray[Any, np.dtype[np.bool_]]
    missing: int


class Assembly:
    """The samples of one call of `capture`, while they come in."""

    def __init__(
        self,
        call: int,
        lengths: Sequence[int],
        geometry: KVGeometry,
        dtype: torch.dtype,
        *,
        workers: int,
        ready_bytes: int = READY_BYTES,
    ) -> None:
        self._call, self._lengths, self._geometry, self._dtype = call, list(lengths), geometry, dtype
        self._workers, self._limit = workers, ready_bytes
        self._partial: dict[int, _Sample] = {}
        self._done: set[int] = set()
        self._ready: deque[Captured] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._finished = False
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Captured]:
        """Complete samples `(index, keys, values)`, in the order in which they become complete.

        Raises:
            CaptureError: if rows came twice, or did not come at all.
        """
        for _ in self._lengths:
            with self._changed:
                while not self._ready and self._error is None:
                    self._changed.wait()
                if self._error is not None:
                    raise self._error
                captured = self._ready.popleft()
                self._waiting_bytes -= _nbytes(captured)
                self._changed.notify_all()
            yield captured

    def wait(self) -> None:
        """Returns when the engine is done with this call.

        Raises:
            KavaError: whatever the engine, or a worker, ended with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._error is not None)
            if self._error is not None:
                raise self._error

    def finish(self) -> None:
        """The engine is done."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Makes whoever waits raise `error`."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def take(self, rank: int, note: Any, data: memoryview | None) -> None:
        """Handles a worker's note; runs on that worker's reading thread."""
        try:
            if isinstance(note, Piece):
                assert data is not None
                self._add(note, data)
            elif isinstance(note, Lost):
                raise CaptureError(f"prompt {note.request}: {note.reason}")
            elif isinstance(note, Flushed):
                if note.call == self._call:  # That of a call which is done may come late.
                    self._flushed()
            elif note is None:
                raise RetryLaterError(f"worker {rank} of the vLLM engine died; finished parts are kept, run it again")
            else:
                raise note
        except BaseException as error:
            self.fail(error)

    def _add(self, piece: Piece, data: memoryview) -> None:
        if piece.call != self._call:
            raise CaptureError(f"rows of call {piece.call} came during call {self._call}")
        tensor = torch.frombuffer(data, dtype=self._dtype).view(piece.shape(self._geometry.head_dim))
        (l0, l1), (h0, h1) = piece.layers, piece.heads
        at = 0
        for rows in piece.rows:
            sample, count = self._sample(rows.request), rows.stop - rows.first
            seen = sample.seen[rows.first : rows.stop, l0:l1, h0:h1]
            if seen.shape[0] != count or seen.any():
                raise CaptureError(f"prompt {rows.request}: rows {rows.first} to {rows.stop} came twice or too far")
            for target, source in ((sample.keys, tensor[0]), (sample.values, tensor[1])):
                target[rows.first : rows.stop, l0:l1, h0:h1] = source[:, at : at + count].transpose(0, 1)
            at += count
            seen[...] = True
            with self._changed:  # Ranks of one engine fill the same samples; the last to be ready hands it over.
                sample.missing -= seen.size
                complete = sample.missing == 0
            if complete:
                self._finish(rows.request, sample)

    def _sample(self, request: int) -> _Sample:
        with self._changed:
            if request in self._done:
                raise CaptureError(f"prompt {request}: rows came after the last one")
            if request not in self._partial:
                g = self._geometry
                shape = (self._lengths[request], g.num_layers, g.num_key_value_heads, g.head_dim)
                keys, values = (torch.empty(shape, dtype=self._dtype) for _ in range(2))
                seen = np.zeros(shape[:3], np.bool_)
                self._partial[request] = _Sample(keys, values, seen, seen.size)
            return self._partial[request]

    def _finish(self, request: int, sample: _Sample) -> None:
        captured = Captured(request, sample.keys, sample.values)
        with self._changed:
            size = _nbytes(captured)
            while self._error is None and self._waiting_bytes and self._waiting_bytes + size > self._limit:
                self._changed.wait()
            del self._partial[request]
            self._done.add(request)
            self._ready.append(captured)
            self._waiting_bytes += size
            self._changed.notify_all()

    def _flushed(self) -> None:
        with self._changed:
            self._workers -= 1
            if self._workers or len(self._done) == len(self._lengths):
                return
            absent = sorted(set(range(len(self._lengths))) - self._done)
            partial = self._partial.get(absent[0])
            cells = self._lengths[absent[0]] * self._geometry.num_layers * self._geometry.num_key_value_heads
            missing = cells if partial is None else partial.missing
        raise CaptureError(
            f"{len(absent)} of {len(self._lengths)} prompts are incomplete; of prompt {absent[0]}, {missing} of "
            f"{cells} (token, layer, head) rows did not come"
        )


def _nbytes(captured: Captured) -> int:
    return captured.keys.nbytes + captured.values.nbytes
