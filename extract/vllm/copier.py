"""Copies rows out of a worker's paged cache, undoes their rotation, and puts them into the ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..rope import RotaryTable
from .handover import Flushed, Lost, Outbox, Piece, Placed, Rows
from .layout import CacheLayout

NULL_BLOCK = 0
"""The engine's block that stands for blocks behind a sliding window."""


@dataclass(frozen=True)
class RequestRows:
    """Rows `first` to `stop` of one prompt, and the blocks in which they lie, from that of row `first` on."""

    call: int
    request: int
    first: int
    stop: int
    blocks: list[int]


@dataclass(frozen=True)
class CachedLayer:
    """One attention layer of this worker."""

    index: int
    """Its number in the whole model."""
    cache: torch.Tensor
    layout: CacheLayout
    rotary: RotaryTable


class Copier:
    """All attention layers of one worker, and its way out."""

    def __init__(
        self,
        layers: Sequence[CachedLayer],
        *,
        outbox: Outbox,
        block_size: int,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        ring_bytes: int,
    ) -> None:
        """Joins them.

        Args:
            layers: consecutive layers.
            outbox: to our process.
            block_size: slots in one block of the engine's scheduler.
            heads: the range of the model's KV heads that this worker sends; none of them if it only repeats others'.
            head_dim: their width.
            dtype: of what is sent.
            ring_bytes: size of the outbox's ring.
        """
        self._layers, self._outbox, self._block_size = list(layers), outbox, block_size
        self._heads, self._head_dim, self._dtype = heads, head_dim, dtype
        self._tables = {id(layer.rotary): layer.rotary for layer in self._layers}
        self._piece_bytes = ring_bytes // 4
        self._device = self._layers[0].cache.device
        self._ring = torch.frombuffer(outbox.memory, dtype=torch.uint8)
        self._cuda: Any = torch.cuda if self._device.type == "cuda" else None
        if self._cuda:
            self._stream = self._cuda.Stream(self._device)
            # Page-locked, so that copies to it run beside the next step.
            self._cuda.check_error(int(self._cuda.cudart().cudaHostRegister(self._ring.data_ptr(), ring_bytes, 0)))

    def copy(self, rows: Sequence[RequestRows]) -> None:
        """Copies these rows of every layer."""
        if self._heads[0] == self._heads[1]:
            return
        for request in rows:
            if NULL_BLOCK in request.blocks:
                reason = "the engine dropped rows behind a sliding window; set enable_prefix_caching: false"
                self._outbox.send(Lost(request.call, request.request, reason))
                return
        row_bytes = 2 * (self._heads[1] - self._heads[0]) * self._head_dim * self._dtype.itemsize
        for batch in batches_of(rows, max(1, self._piece_bytes // row_bytes), self._block_size):
            positions = torch.cat([torch.arange(r.first, r.stop) for r in batch])
            slots = torch.cat([self._slots(r) for r in batch])
            positions, slots = positions.to(self._device), slots.to(self._device)
            tables = {key: table.at(positions) for key, table in self._tables.items()}
            step = max(1, self._piece_bytes // (row_bytes * len(slots)))
            for start in range(0, len(self._layers), step):
                layers = self._layers[start : start + step]
                self._send(batch, layers, tables, slots)

    def flush(self, call: int) -> None:
        """Says that nothing more comes for this call, after all that is under way."""
        self._outbox.send(Flushed(call))

    def close(self) -> None:
        """Closes the way out."""
        self._outbox.close()
        if self._cuda:
            self._cuda.cudart().cudaHostUnregister(self._ring.data_ptr())

    def _slots(self, rows: RequestRows) -> torch.Tensor:
        """The cache slot of each row."""
        inside = torch.arange(rows.first % self._block_size, rows.first % self._block_size + rows.stop - rows.first)
        return torch.tensor(rows.blocks)[inside // self._block_size] * self._block_size + inside % self._block_size

    def _send(
        self,
        batch: Sequence[RequestRows],
        layers: list[CachedLayer],
        tables: dict[int, RotaryTable],
        slots: torch.Tensor,
    ) -> None:
        piece = Piece(
            batch[0].call,
            (layers[0].index, layers[-1].index + 1),
            self._heads,
            tuple(Rows(r.request, r.first, r.stop) for r in batch),
        )
        shape = piece.shape(self._head_dim)
        nbytes = torch.Size(shape).numel() * self._dtype.itemsize
        offset = self._outbox.reserve(nbytes)
        place = self._ring[offset : offset + nbytes].view(self._dtype).view(shape)
        out = torch.empty(shape, dtype=self._dtype, device=self._device) if self._cuda else place
        for at, layer in enumerate(layers):
            keys, values = layer.layout.read(layer.cache, slots)
            out[0, at] = tables[id(layer.rotary)].unrotate(keys.float())
            out[1, at] = values
        if not self._cuda:
            self._outbox.send(Placed(piece, offset, nbytes))
            return
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            place.copy_(out, non_blocking=True)
            out.record_stream(self._stream)
            done = self._stream.record_event()
        self._outbox.send(Placed(piece, offset, nbytes), done.synchronize)


def batches_of(rows: Sequence[RequestRows], limit: int, block_size: int) -> list[list[RequestRows]]:
    """Groups of one call's rows of at most `limit` rows; a request with more is cut."""
    batches: list[list[RequestRows]] = []
    free = 0
    for request in rows:
        first = request.first
        while first < request.stop:
            if free == 0 or batches[-1][0].call != request.call:
                batches.append([])
                free = limit
            stop = min(request.stop, first + free)
            blocks = request.blocks[first // block_size - request.first // block_size :]
            batches[-1].append(RequestRows(request.call, request.request, first, stop, blocks))
            free -= stop - first
            first = stop
    return batches
