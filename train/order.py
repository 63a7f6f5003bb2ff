"""In which order samples are read: seeded, kind to disks, and the same for any number of ranks.

An epoch is a shuffle that looks like one and reads like a walk: parts come in random order, and samples in random order
among those of a few parts that are next to each other then. Epochs are laid end to end and cut into batches of equal
size, so that the tail of one is the head of the next batch: nothing is dropped, nothing is filled up, and every sample
is read once in each epoch. All of it is a function of the seed and of the samples, so that the number of the next row
is all there is to remember.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from ..errors import StageError
from ..store.fingerprint import digest_json
from ..store.hashing import hash_bytes

Row = tuple[int, ...]
"""Samples that lie one after the other in a row of a batch, by their number among those of the split."""

GROUPED_BATCHES: Final = 50
"""Batches whose samples are sorted by length together: enough for little padding, few enough to stay a shuffle."""


@dataclass(frozen=True)
class _Epoch:
    """The rows of an epoch in two arrays: a list of tuples would take 100 bytes a sample."""

    samples: np.ndarray[Any, Any]
    """Samples of all rows, row after row."""
    stops: np.ndarray[Any, Any]
    """End of each row in `samples`."""

    def __len__(self) -> int:
        return len(self.stops)

    def rows(self, first: int, count: int) -> list[Row]:
        """Return at most `count` rows from row `first` on."""
        stops = self.stops[first : first + count].tolist()
        start = int(self.stops[first - 1]) if first else 0
        bounds = zip([start, *stops], stops, strict=False)
        return [tuple(self.samples[begin:stop].tolist()) for begin, stop in bounds]


class Order:
    """The rows of all batches of a training, endless: epoch after epoch."""

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray[Any, Any],
        parts: Sequence[int] | np.ndarray[Any, Any],
        *,
        seed: int,
        window: int = 16,
        group: int | None = None,
        pack_tokens: int | None = None,
    ) -> None:
        """The order of samples.

        Args:
            lengths: tokens of each sample.
            parts: the part of the store that each sample is in.
            seed: of the shuffle.
            window: parts whose samples are shuffled together.
            group: rows of a batch, all ranks' together, if these are to be of about equal length; None not to look at
                lengths.
            pack_tokens: tokens of a row that several samples share; None for a row for each sample.

        Raises:
            StageError: if there is no sample, or one is longer than a row.
        """
        self._lengths, self._parts = np.asarray(lengths, np.int64), np.asarray(parts, np.int64)
        if not len(self._lengths):
            raise StageError("there is no training sample")
        if pack_tokens is not None and self._lengths.max() > pack_tokens:
            longest = int(self._lengths.max())
            raise StageError(
                f"train.pack_tokens: {pack_tokens} is less than the {longest} tokens of the longest sample; give at "
                f"least {longest}"
            )
        self._seed, self._window, self._group, self._pack_tokens = seed, window, group, pack_tokens
        self._starts = [0]
        self._made: dict[int, _Epoch] = {}

    def rows(self, first: int, count: int) -> list[Row]:
        """Rows `first .. first + count` of the training."""
        found: list[Row] = []
        while len(found) < count:
            epoch, start = self._place(first + len(found))
            found += self._epoch(epoch).rows(start, count - len(found))
        return found

    def epochs(self, row: int) -> float:
        """How many epochs are behind before this row."""
        epoch, start = self._place(row)
        return epoch + start / len(self._epoch(epoch))

    def state(self, row: int) -> dict[str, Any]:
        """For a checkpoint: the place of the next row, and what the order depends on."""
        epoch, start = self._place(row)
        return {"epoch": epoch, "row": start, "starts": self._starts[: epoch + 1], "digest": self.digest}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` was of, so that no epoch before it is laid out again.

        Raises:
            StageError: if samples, or what orders them, are not what they were.
        """
        if state["digest"] != self.digest:
            raise StageError(
                "the checkpoint is of another order of samples: some were added, removed or failed since, or settings "
                "changed; begin again with --force train"
            )
        self._starts = list(state["starts"])

    @cached_property
    def digest(self) -> str:
        """Of all that determines the order."""
        settings = [self._seed, self._window, self._group, self._pack_tokens]
        return digest_json([settings, hash_bytes(self._lengths.data), hash_bytes(self._parts.data)])

    def _place(self, row: int) -> tuple[int, int]:
        """The epoch of a row, and its number there."""
        while self._starts[-1] <= row:
            epoch = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self._epoch(epoch)))
        epoch = bisect.bisect_right(self._starts, row) - 1
        return epoch, row - self._starts[epoch]

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._made:
            # A batch spans two at most, where it is not larger than an epoch; to make one again is no harm.
            for old in sorted(self._made)[:-1]:
                del self._made[old]
            self._made[number] = self._make(number)
        return self._made[number]

    def _make(self, number: int) -> _Epoch:
        rng = np.random.default_rng((self._seed, number))
        windows = self._windows(rng)
        if self._pack_tokens is not None:
            order, sizes = [], []
            for window in windows:
                packed = pack(window.tolist(), self._lengths[window].tolist(), self._pack_tokens)
                rows = [packed[i] for i in rng.permutation(len(packed))]
                order.append(np.array([sample for row in rows for sample in row], np.int64))
                sizes.append(np.array([len(row) for row in rows], np.int64))
            return _Epoch(np.concatenate(order), np.cumsum(np.concatenate(sizes)))
        samples = np.concatenate(windows)
        if self._group is not None:
            samples = self._grouped(samples, self._starts[number], self._group, rng)
        return _Epoch(samples, np.arange(1, len(samples) + 1))

    def _windows(self, rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
        """Samples in the order of a shuffle, cut where the next parts begin."""
        parts = rng.permutation(np.unique(self._parts))
        place = np.empty(int(self._parts.max()) + 1, np.int64)
        place[parts] = np.arange(len(parts)) // self._window
        window_of = place[self._parts]
        samples = rng.permutation(len(self._parts))
        samples = samples[np.argsort(window_of[samples], kind="stable")]
        return np.split(samples, np.cumsum(np.bincount(window_of))[:-1])

    def _grouped(
        self, samples: np.ndarray[Any, Any], begun: int, size: int, rng: np.random.Generator
    ) -> np.ndarray[Any, Any]:
        """Samples of about equal length next to each other, `size` at a time; batches stay in random order.

        `begun` rows lie before: the first samples fill up the batch in hand.
        """
        found = [samples[: -begun % size]]
        for first in range(len(found[0]), len(samples), GROUPED_BATCHES * size):
            chunk = samples[first : first + GROUPED_BATCHES * size]
            chunk = chunk[np.argsort(-self._lengths[chunk], kind="stable")]
            batches = [chunk[i : i + size] for i in range(0, len(chunk), size)]
            # Only the last batch of an epoch can be short, and only at the end it keeps the next ones in step.
            whole = len(chunk) // size
            found += [batches[i] for i in rng.permutation(whole)] + batches[whole:]
        return np.concatenate(found)


def pack(samples: Sequence[int], lengths: Sequence[int], budget: int) -> list[Row]:
    """Puts samples into rows of at most `budget` tokens: the longest first, each where it leaves the least room.

    Best-fit decreasing, which needs at most 11/9 of the fewest possible rows (Johnson et al. 1974).

    Args:
        samples: any numbers.
        lengths: of each, at most `budget`.
        budget: tokens of a row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # Room that is left, and the row's number; sorted.
    for place in sorted(range(len(samples)), key=lambda i: -lengths[i]):
        fit = bisect.bisect_left(rooms, (lengths[place], -1))
        if fit < len(rooms):
            room, row = rooms.pop(fit)
        else:
            room, row = budget, len(rows)
            rows.append([])
        rows[row].append(samples[place])
        bisect.insort(rooms, (room - lengths[place], row))
    return [tuple(row) for row in rows]
