"""The corpus: all records in order, read from files as the recipe's `corpus` section says."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from ..errors import CorpusError
from ..store import Segment, Split, digest_json
from .corpus_settings import CorpusSettings, FieldNames, HeldoutSettings, SplitSettings
from .files import Source, corpus_stamp, find_sources
from .formats import GSM8K_MARK, Format, Reading, Row, formats_of, needed_columns, read_row
from .heldout import Groups, hold_out
from .messages import unread_keys
from .record import Record, assemble
from .record_file import RecordFile, segment_bytes

_REMEMBERED: Final = 1000

__all__ = [
    "Corpus",
    "CorpusSettings",
    "FieldNames",
    "HeldoutSettings",
    "Record",
    "SplitSettings",
    "corpus_stamp",
    "load_corpus",
]


@dataclass(frozen=True)
class Corpus:
    """All records, in order."""

    records: Sequence[Record]
    """Read from disk one by one; hold on to none that is not needed."""
    notes: tuple[str, ...] = ()
    """How the records were read and what of them was not, a line each."""

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def digest(self) -> str:
        """Digest of every id, text, segment, turn and split."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(record.digest.encode())
        return digest.hexdigest()[:32]

    @cached_property
    def text_bytes(self) -> Sequence[int]:
        """UTF-8 bytes of each record's canonical text."""
        return self._file.text_bytes if self._file is not None else array("q", (r.num_bytes for r in self.records))

    @cached_property
    def segment_records(self) -> dict[Segment, int]:
        """Number of records in which each segment has text."""
        if self._file is not None:
            return self._file.segment_records
        return dict.fromkeys(Segment, 0) | Counter(segment for r in self.records for segment in segment_bytes(r))

    @cached_property
    def num_chats(self) -> int:
        """Number of records with messages."""
        if self._file is not None:
            return self._file.num_chats
        return sum(bool(record.messages) for record in self.records)

    def subset(self, indices: Sequence[int]) -> Corpus:
        """The records at these indices."""
        return Corpus([self.records[i] for i in indices])

    def split(self, split: Split) -> Sequence[int]:
        """Indices of the records of a split."""
        splits = self._file.splits if self._file is not None else (record.split for record in self.records)
        return array("q", (index for index, other in enumerate(splits) if other == split))

    def find(self, sample_id: str) -> Record | None:
        """The record with this id, if there is one."""
        if self._file is None:
            return next((record for record in self.records if record.sample_id == sample_id), None)
        try:
            return self._file[self._file.index(sample_id)]
        except ValueError:
            return None

    @property
    def _file(self) -> RecordFile | None:
        return self.records if isinstance(self.records, RecordFile) else None


def load_corpus(settings: CorpusSettings) -> Corpus:
    """Reads all records.

    Raises:
        CorpusError: naming the file and the line or row, and what is wrong with it.
        HubUnreachableError: if a data set of the hub is not on this machine, and the hub cannot be reached.
    """
    loader = _Loader(settings)
    loader.read(settings.paths, Split.TRAIN)
    heldout = settings.heldout
    if not len(loader.records):
        raise CorpusError(f"corpus {settings.label}: there is no record in it. Name another file.")
    if heldout is not None and heldout.path is not None:
        loader.read((heldout.path,) if isinstance(heldout.path, str) else heldout.path, Split.HELDOUT)
    loader.records.flush()
    loader.refuse_absent_fields()
    loader.records.refuse_repeated_ids()
    if heldout is not None and heldout.path is None:
        hold_out(loader.records, loader.groups, heldout, settings.label)
    return Corpus(loader.records, loader.notes())


@dataclass
class _Loader:
    """Reads records into a file, and notes what was read of them."""

    settings: CorpusSettings
    records: RecordFile = field(default_factory=RecordFile)
    groups: Groups | None = None
    _formats: Counter[str] = field(default_factory=Counter)
    _lines: dict[str, str] = field(default_factory=dict)
    _fields: dict[str, None] = field(default_factory=dict)
    """All fields of the records, in the order of their appearance."""
    _with_value: set[str] = field(default_factory=set)
    """Fields that have a value in some record."""
    _used: set[str] = field(default_factory=set)
    _unread_keys: set[str] = field(default_factory=set)
    _with_calls: int = 0
    """Records with tool calls."""
    _by_keys: dict[tuple[str, ...], list[Format]] = field(default_factory=dict)
    _marked: int = 0
    """Records without a rationale whose answer contains GSM8K's mark."""

    def __post_init__(self) -> None:
        heldout = self.settings.heldout
        if heldout is not None and heldout.group is not None:
            self.groups = Groups()

    def read(self, paths: Sequence[str], split: Split) -> None:
        """Reads the files of these names."""
        settings, formats = self.settings, formats_of(self.settings)
        number, first = 0, len(self.records)
        choose = lambda columns: needed_columns(settings, columns)  # noqa: E731
        for source in find_sources(settings, paths, choose):
            self._fields.update(dict.fromkeys(source.columns or ()))
            self._refuse_absent_columns(source)
            for where, row in source.rows():
                if settings.limit is not None and number >= settings.limit:
                    break
                number += 1
                known, reading = read_row(row, self._candidates(row, formats), settings, where, source.columns or row)
                self._note(row, known.name, known.line, known.columns, reading)
                name = _sample_id(row, settings.fields.id or "id", where)
                record = assemble(reading.pieces, settings.separator, name, where, reading.messages)
                named = bool(name)
                name = name or digest_json(record.content)[:16]
                self.records.append(replace(record, sample_id=name, split=split), where, named=named)
                if self.groups is not None:
                    self.groups.append(self._group(row, where))
        self.records.number_repetitions(first)

    def _candidates(self, row: Row, formats: list[Format]) -> list[Format]:
        """The formats whose required fields a record has, remembered for records of the same fields."""
        keys = tuple(row)
        if keys not in self._by_keys:
            if len(self._by_keys) >= _REMEMBERED:
                self._by_keys.clear()
            self._by_keys[keys] = [known for known in formats if row.keys() >= set(known.required)]
        return self._by_keys[keys]

    def refuse_absent_fields(self) -> None:
        """Makes sure that every field that the recipe names has a value in some record.

        Raises:
            CorpusError: naming the fields that exist.
        """
        named = {f"corpus.fields.{role}": name for role, name in self.settings.fields if name is not None}
        for key, name in named.items():
            if name not in self._with_value:
                raise CorpusError(
                    f"corpus {self.settings.label}: no record has the field {name!r}, named by {key}; the fields are "
                    f"{_listed(self._fields)}. Correct the name, or leave it out."
                )

    def notes(self) -> tuple[str, ...]:
        """The formats that were read and what was not read, a line each."""
        several = len(self._formats) > 1
        lines = []
        for name, count in self._formats.items():
            records = f" ({count:,} records)" if several else ""
            lines.append(f"{name}: {self._lines[name]}{records}" if self._lines[name] else f"{name}{records}")
        if unread := [name for name in self._fields if name not in self._used]:
            lines.append(f"columns that are not read: {_listed(unread)}")
        if self._unread_keys:
            lines.append(f"keys of messages whose text is not read: {_listed(sorted(self._unread_keys))}")
        if self._with_calls:
            lines.append(f"{self._with_calls:,} records have tool calls, which are read under a chat template alone")
        if self._marked:
            lines.append(
                f"{self._marked:,} answers contain {GSM8K_MARK} and their records have no rationale; corpus.split: "
                f"{{field: NAME, at: '{GSM8K_MARK}'}} splits them"
            )
        return tuple(lines)

    def _note(self, row: Row, name: str, line: str, columns: Sequence[str], reading: Reading) -> None:
        self._formats[name] += 1
        self._lines[name] = line
        if row.keys() - self._fields.keys():
            self._fields.update(dict.fromkeys(row))
        self._with_value.update(key for key in row if key not in self._with_value and row[key] is not None)
        self._used.update(columns, (self.settings.fields.id or "id",))
        self._unread_keys |= unread_keys(reading.messages)
        self._with_calls += any(message.get("tool_calls") for message in reading.messages)
        segments = {piece.segment for piece in reading.pieces}
        if Segment.RATIONALE not in segments and not reading.messages:
            self._marked += any(p.segment == Segment.ANSWER and f"\n{GSM8K_MARK}" in p.text for p in reading.pieces)

    def _refuse_absent_columns(self, source: Source) -> None:
        """A table says at once which columns it has."""
        if source.columns is not None and (named := self.settings.fields.content):
            for role, name in named.items():
                if name not in source.columns:
                    raise CorpusError(
                        f"corpus {source.label}: there is no column {name!r}, named by corpus.fields.{role}; the "
                        f"columns are {_listed(source.columns)}. Correct the name, or leave it out."
                    )

    def _group(self, row: Row, where: str) -> str:
        assert self.settings.heldout is not None
        group = self.settings.heldout.group
        assert group is not None
        self._used.add(group)
        if row.get(group) is None:
            raise CorpusError(f"{where}: there is no field {group!r}, named by corpus.heldout.group")
        return str(row[group])


def _sample_id(row: Row, field_name: str, where: str) -> str:
    value: Any = row.get(field_name)
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise CorpusError(f"{where}: the id must be a string or a whole number, not {ascii(value)[:60]}.")
    name = str(value)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CorpusError(f"{where}: the id {name!a} is not valid Unicode. Give another id.") from None
    return name


def _listed(names: Sequence[str] | dict[str, None]) -> str:
    """Names for a line, without what a terminal cannot show, and not all of hundreds."""
    shown = [ascii(name)[1:-1] for name in list(names)[:20]]
    more = len(names) - len(shown)
    return (", ".join(shown) or "none") + (f" and {more} more" if more > 0 else "")
