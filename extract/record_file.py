"""Records in a temporary file, so that memory holds an index of a few bytes a record and not the corpus.

The file lies in the system's temporary folder (`TMPDIR`) without a name, and goes with the process. Reading is
`os.pread`, which threads and forked processes may do at the same time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final, overload

import numpy as np

from ..errors import CorpusError
from ..store import Segment, Split
from ..store.files import disk_errors, read_all
from .record import Record

_BLOCK: Final = 1 << 20


class RecordFile(Sequence[Record]):
    """A sequence of records on disk; `append` each, then read by index."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir())
        with disk_errors(self._folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(prefix="kava-corpus-", buffering=0)  # noqa: SIM115
        self._unwritten = bytearray()
        weakref.finalize(self, self._file.close)
        self._offsets = array("q", [0])
        self.num_chats = 0
        """Number of records with messages."""
        self._ids = array("Q")
        """Hash of each record's id."""
        self._repeats = array("I")
        """Which of the records of one content it is, from 1 on; 0 for a record with an id of its own."""
        self.splits = bytearray()
        """Split of each record."""
        self.text_bytes = array("q")
        """UTF-8 bytes of each record's canonical text."""
        self.segment_bytes: dict[Segment, int] = dict.fromkeys(Segment, 0)
        """UTF-8 bytes of each segment, of all records together."""
        self.segment_records: dict[Segment, int] = dict.fromkeys(Segment, 0)
        """Number of records in which a segment has text."""

    def append(self, record: Record, where: str, *, named: bool = True) -> None:
        """Adds a record.

        Args:
            record: its `split` may be changed in `splits` later.
            where: file and line, for messages.
            named: false if its id is a digest of its content, which `number_repetitions` makes unique.
        """
        fields = [where, record.sample_id, record.text, record.segments, record.turns, record.messages, record.steps]
        data = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        self._unwritten += data
        if len(self._unwritten) >= _BLOCK:
            self.flush()
        self._offsets.append(self._offsets[-1] + len(data))
        self._ids.append(_hash(record.sample_id))
        self._repeats.append(0 if named else 1)
        self.splits.append(record.split)
        self.num_chats += bool(record.messages)
        self.text_bytes.append(record.num_bytes)
        sizes = segment_bytes(record)
        for segment, size in sizes.items():
            self.segment_bytes[segment] += size
            self.segment_records[segment] += 1

    def flush(self) -> None:
        """Writes what was appended; threads may read at the same time from then on."""
        with disk_errors(self._folder):
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def __len__(self) -> int:
        return len(self.splits)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """The record, or a list of them, read from the file."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        _, sample_id, text, segments, turns, messages, steps = self._fields(index)
        return Record(
            sample_id,
            text,
            tuple((start, stop, Segment(kind)) for start, stop, kind in segments),
            tuple((role, start, stop) for role, start, stop in turns),
            Split(self.splits[index]),
            tuple(messages),
            tuple((start, stop) for start, stop in steps),
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """The index of a record, or of the record with an id.

        Raises:
            ValueError: if there is none.
        """
        sample_id = value.sample_id if isinstance(value, Record) else value
        hashes, order = self._sorted
        first = int(np.searchsorted(hashes, np.uint64(_hash(sample_id))))
        while first < len(hashes) and hashes[first] == _hash(sample_id):
            if self._fields(int(order[first]))[1] == sample_id:
                return int(order[first])
            first += 1
        raise ValueError(sample_id)

    def number_repetitions(self, first: int) -> None:
        """Tells records of one content apart: the second one's id ends in `-2`, and so on.

        Args:
            first: the record to begin with.
        """
        hashes = np.frombuffer(self._ids, np.uint64)[first:].copy()
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        counts: dict[str, int] = {}
        before = -1
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            if place != before + 1:  # Another run of equal hashes.
                counts = {}
            before = place
            for index in (first + int(order[place]), first + int(order[place + 1])):
                if self._repeats[index] != 1:
                    continue
                name = self._fields(index)[1]
                if index == first + int(order[place]) and name in counts:
                    continue
                counts[name] = counts.get(name, 0) + 1
                self._repeats[index] = counts[name]
        for index in np.flatnonzero(np.frombuffer(self._repeats, np.uint32)[first:] > 1).tolist():
            self._ids[first + index] = _hash(self._fields(first + index)[1])
        self.__dict__.pop("_sorted", None)

    def refuse_repeated_ids(self) -> None:
        """Makes sure that every id occurs once.

        Raises:
            CorpusError: naming the id and both places.
        """
        hashes, order = self._sorted
        repeated: dict[int, int] = {}
        for position in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            first, second = int(order[position]), int(order[position + 1])
            if self._fields(first)[1] == self._fields(second)[1]:
                repeated[second] = first
        if repeated:
            second = min(repeated)
            (where, sample_id), before = self._fields(second)[:2], self._fields(repeated[second])[0]
            raise CorpusError(f"{where}: id {sample_id!a} was used before, by {before}. Give every record its own id.")

    def sample_ids(self) -> Iterator[str]:
        """All ids in order."""
        return (self._fields(index)[1] for index in range(len(self)))

    @cached_property
    def _sorted(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Hashes of the ids, ascending, and the records that they belong to, ascending where they are equal."""
        hashes = np.frombuffer(self._ids, np.uint64).copy()
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _fields(self, index: int) -> list[Any]:
        if self._unwritten:
            self.flush()
        start, stop = self._offsets[index], self._offsets[index + 1]
        fields: list[Any] = json.loads(read_all(self._file.fileno(), stop - start, start))
        if self._repeats[index] > 1:
            fields[1] = f"{fields[1]}-{self._repeats[index]}"
        return fields


def segment_bytes(record: Record) -> dict[Segment, int]:
    """UTF-8 bytes of each segment that has text other than white space."""
    sizes: dict[Segment, int] = {}
    for start, stop, kind in record.segments:
        part = record.text[start:stop]
        if part and not part.isspace():
            sizes[kind] = sizes.get(kind, 0) + (len(part) if part.isascii() else len(part.encode()))
    return sizes


def _hash(sample_id: str) -> int:
    digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
