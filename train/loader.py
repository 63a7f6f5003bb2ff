"""Batches ahead of the training: threads read samples straight into a ring of reused buffers.

A batch's keys and values are tens of megabytes. Copied once, into memory that is there already (pinned, where there is
a device), they cost what decoding costs; sent over from worker processes, into fresh memory each time, several times
that. Decoding holds no Python lock, so threads are enough. Processes are there for targets whose reading is Python's
own work.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import KavaError
from .data import TargetCollator, TargetDataset, places
from .order import Row


class Loader(Protocol):
    """Gives batches in order."""

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next batches; what the last call gave is no longer valid. Fewer where there are no more."""

    def close(self) -> None:
        """Ends what reads."""


class Batches(Dataset[dict[str, Any]]):
    """The batches of one rank, by number."""

    def __init__(
        self, dataset: TargetDataset, collator: TargetCollator, rows: Callable[[int], Sequence[Row]], count: int
    ) -> None:
        """The batches.

        Args:
            dataset: the samples.
            collator: makes batches of them.
            rows: the samples in each row of a batch, by its number.
            count: how many batches there are.
        """
        self.dataset, self.collator, self.rows, self.count = dataset, collator, rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A batch in memory of its own, read here and now."""
        batch = _Batch(self, self.rows(number), _Buffer(pin=False))
        for place in range(len(batch)):
            batch.read(place)
        return batch.done.result()


class ThreadedLoader:
    """Batches that threads read ahead.

    The memory for targets is that of `ahead` batches and of those in use, however slow the training is. A fault in
    reading is raised where its batch is taken.
    """

    def __init__(self, batches: Batches, *, first: int = 0, threads: int, ahead: int, pin: bool) -> None:
        """A loader; it reads nothing before the first batch is taken.

        Args:
            batches: what to read.
            first: number of the first batch; nothing before it is read.
            threads: that read, each a sample at a time.
            ahead: batches that are read, or being read, beyond those in use.
            pin: whether to read into pinned memory.
        """
        self._batches, self._next, self._ahead, self._pin = batches, first, ahead, pin
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kava-read")
        self._pending: deque[_Batch] = deque()
        self._free: list[_Buffer] = []
        self._used: list[_Buffer] = []

    def take(self, count: int) -> list[dict[str, Any]]:
        """See `Loader`.

        Raises:
            KavaError: of a sample that cannot be read, with its number.
        """
        self._free += self._used
        self._begin(count)
        taken = [self._pending.popleft() for _ in range(min(count, len(self._pending)))]
        self._used = [batch.buffer for batch in taken]
        self._begin(self._ahead)
        return [batch.done.result() for batch in taken]

    def close(self) -> None:
        """Ends the threads, each after the sample in hand."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, wanted: int) -> None:
        """Has as many batches read as are wanted, and left."""
        while len(self._pending) < wanted and self._next < len(self._batches):
            buffer = self._free.pop() if self._free else _Buffer(pin=self._pin)
            batch = _Batch(self._batches, self._batches.rows(self._next), buffer)
            self._next += 1
            self._pending.append(batch)
            for place in range(len(batch)):
                self._pool.submit(batch.read, place)


class ProcessLoader:
    """Batches that processes read ahead: torch's DataLoader, whose memory for targets is new with every batch."""

    def __init__(self, batches: Batches, *, first: int = 0, workers: int, **options: Any) -> None:
        """A loader.

        Args:
            batches: what to read.
            first: number of the first batch.
            workers: processes.
            options: further ones of `torch.utils.data.DataLoader`.
        """
        loader = DataLoader(
            _Told(batches),
            batch_size=None,
            sampler=range(first, len(batches)),
            num_workers=workers,
            # It draws a seed for its workers; the training's own generator is not touched.
            generator=torch.Generator(),
            **options,
        )
        self._iterator = iter(loader)

    def take(self, count: int) -> list[dict[str, Any]]:
        """See `Loader`.

        Raises:
            KavaError: of a sample that cannot be read.
        """
        found = [batch for _, batch in zip(range(count), self._iterator, strict=False)]
        for batch in found:
            if isinstance(batch, KavaError):
                raise batch
        return found

    def close(self) -> None:
        """Ends the processes."""
        # They end with their iterator.
        del self._iterator


class _Told(Dataset[Any]):
    """Batches, or the error in the place of one: torch would hand on a traceback as its message."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any] | KavaError:
        try:
            return self.batches[number]
        except KavaError as error:
            return error


class _Buffer:
    """Memory for the targets of one batch after the other; grows to the largest."""

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._memory: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with whatever was in it."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory.pop(name, None)  # Before the new one is there: never both.
            self._memory[name] = torch.empty(size, dtype=dtype, pin_memory=self._pin)
        return self._memory[name][:size].view(shape)


class _Batch:
    """A batch that is being read, by several threads at once."""

    def __init__(self, batches: Batches, rows: Sequence[Row], buffer: _Buffer) -> None:
        self.done: Future[dict[str, Any]] = Future()
        self.buffer = buffer
        self._batches, self._rows = batches, rows
        dataset = batches.dataset
        self._ends = [sum(dataset.lengths[item] for item in row) for row in rows]
        size = (len(rows), max(self._ends))
        self._tensors = {n: buffer.tensor(n, (*size, *dataset.shape), dataset.dtype) for n in dataset.names}
        self._places = list(places(rows, dataset.lengths.__getitem__))
        self._samples: list[Any] = [None] * len(self._places)
        self._left, self._lock = len(self._places), threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, place: int) -> None:
        """Reads one of its samples; the last one to be read completes the batch."""
        try:
            row, start, _, item = self._places[place]
            dataset = self._batches.dataset
            here = slice(start, start + dataset.lengths[item])
            self._samples[place] = dataset.read(item, {n: t[row, here] for n, t in self._tensors.items()})
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self.done.set_result(self._complete())
        except BaseException as error:
            with self._lock:
                if not self.done.done():
                    self.done.set_exception(error)

    def _complete(self) -> dict[str, Any]:
        for row, end in enumerate(self._ends):
            for tensor in self._tensors.values():
                tensor[row, end:] = 0
        samples = iter(self._samples)
        return self._batches.collator.collate([[next(samples) for _ in row] for row in self._rows], self._tensors)
