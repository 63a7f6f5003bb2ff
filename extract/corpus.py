"""Corpus records: where they come from, what their segments are, which are held out.

The *canonical text* of a record is what every model reads; it is in Unicode's composed form (NFC), because some
tokenizers compose it anyway and byte spans must be of one text. Segments come from the record's fields, never from
words in the text. A separator between two fields belongs to the segment that follows it.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from ..errors import CorpusError, HubUnreachableError
from ..hub import hub_reachable
from ..store import Segment, Split, digest_json

Row = dict[str, Any]


class FieldNames(BaseModel):
    """What the record's fields are called in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = "id"
    prompt: str = "prompt"
    rationale: str = "rationale"
    answer: str = "answer"
    text: str = "text"
    messages: str = "messages"


class HeldoutSettings(BaseModel):
    """Which samples are held out: a share of them, a share (or a list) of the values of a group field, or a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float | None = Field(None, gt=0, lt=1)
    """Share of the samples, or of the groups where `group` is given."""
    group: str | None = None
    """A field of the records; samples of one group are never split."""
    values: tuple[str, ...] | None = None
    """Values of the group field that are held out."""
    path: str | None = None
    """A file of held-out records, beside the corpus."""
    seed: int = 0

    @model_validator(mode="after")
    def _one_way(self) -> HeldoutSettings:
        ways = [name for name in ("ratio", "values", "path") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError("give exactly one of ratio, values or path")
        if self.values is not None and self.group is None:
            raise ValueError("values needs group, the field they are values of")
        return self


class CorpusSettings(BaseModel):
    """Where the records are and how to read them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    """A `.jsonl` or `.parquet` file, a folder saved by `datasets`, or a hub id."""
    subset: str | None = None
    """The configuration name of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    fields: FieldNames = FieldNames()
    separator: str = "\n"
    """Between the fields in the canonical text."""
    heldout: HeldoutSettings | None = None
    limit: PositiveInt | None = None
    """Take only the first records."""


@dataclass(frozen=True)
class Record:
    """One sample of the corpus."""

    sample_id: str
    text: str
    """The canonical text."""
    segments: tuple[tuple[int, int, Segment], ...]
    """Character ranges of the canonical text, adjoining, that cover all of it."""
    turns: tuple[tuple[str, int, int], ...]
    """Chat role and character range of each message, for chat templates."""
    split: Split = Split.TRAIN
    messages: tuple[dict[str, Any], ...] = ()
    """The messages as the corpus gives them; empty for a record of other fields."""


@dataclass(frozen=True)
class Corpus:
    """All records, in order."""

    records: list[Record]

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def digest(self) -> str:
        """Digest of every id, text, segment, turn and split."""
        digest = hashlib.sha256()
        for r in self.records:
            digest.update(digest_json([r.sample_id, r.text, r.segments, r.turns, int(r.split)]).encode())
        return digest.hexdigest()[:32]

    def subset(self, indices: list[int]) -> Corpus:
        """The records at these indices."""
        return Corpus([self.records[i] for i in indices])

    def split(self, split: Split) -> list[int]:
        """Indices of the records of a split."""
        return [i for i, record in enumerate(self.records) if record.split == split]


def load_corpus(settings: CorpusSettings) -> Corpus:
    """Reads all records.

    Raises:
        CorpusError: naming the file and the line or row, and what is wrong with it.
    """
    pairs = list(_records(settings, settings.path, Split.TRAIN))
    heldout = settings.heldout
    if not pairs:
        raise CorpusError(f"corpus {settings.path}: there is no record in it")
    if heldout is not None and heldout.path is not None:
        pairs += _records(settings, heldout.path, Split.HELDOUT)
    elif heldout is not None:
        pairs = _hold_out(pairs, heldout, settings.path)
    seen: dict[str, str] = {}
    for record, (where, _) in pairs:
        if record.sample_id in seen:
            raise CorpusError(f"{where}: id {record.sample_id!r} was used before, by {seen[record.sample_id]}")
        seen[record.sample_id] = where
    return Corpus([record for record, _ in pairs])


def _records(settings: CorpusSettings, path: str, split: Split) -> Iterator[tuple[Record, tuple[str, Row]]]:
    repeats: dict[str, int] = {}
    for number, (where, row) in enumerate(_rows(settings, path)):
        if settings.limit is not None and number >= settings.limit:
            return
        record = replace(_record(row, settings, where), split=split)
        if not record.sample_id:  # No id field: the content names the sample, and its repetitions are counted.
            digest = digest_json([record.text, record.segments, record.turns])[:16]
            repeats[digest] = repeats.get(digest, 0) + 1
            name = digest if repeats[digest] == 1 else f"{digest}-{repeats[digest]}"
            record = replace(record, sample_id=name)
        yield record, (where, row)


def _rows(settings: CorpusSettings, path: str) -> Iterator[tuple[str, Row]]:
    file = Path(path).expanduser()
    if file.suffix == ".jsonl":
        yield from _jsonl_rows(file)
    elif file.suffix == ".parquet":
        yield from _parquet_rows(file)
    else:
        yield from _dataset_rows(settings, path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise CorpusError(f"{where}: not a JSON object: {error}") from None
                if not isinstance(row, dict):
                    raise CorpusError(f"{where}: not a JSON object but {type(row).__name__}")
                yield where, row
    except OSError as error:
        raise CorpusError(f"corpus {path}: {error.strerror or error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"corpus {path}: {error}") from None


def _dataset_rows(settings: CorpusSettings, path: str) -> Iterator[tuple[str, Row]]:
    folder = Path(path).expanduser()
    offline = not folder.exists() and not hub_reachable()
    import datasets

    try:
        if folder.is_dir() and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
            found = datasets.load_from_disk(str(folder))
            found = found[settings.split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(path, settings.subset, split=settings.split, revision=settings.revision)
    except Exception as error:
        if offline:
            raise HubUnreachableError(path) from None
        reason = str(error).strip().split("\n")[0]
        raise CorpusError(
            f"corpus {path!r} cannot be loaded: {reason}; give a file, a saved data set or a hub id"
        ) from None
    for number, row in enumerate(found, 1):
        yield f"{path} row {number}", row


def _record(row: Row, settings: CorpusSettings, where: str) -> Record:
    names = settings.fields
    if row.get(names.messages) is not None:
        pieces = _message_pieces(row[names.messages], where)
    elif row.get(names.text) is not None:
        pieces = [("assistant", row[names.text], Segment.ANSWER)]
    else:
        pieces = [
            ("user", row.get(names.prompt), Segment.PROMPT),
            ("assistant", row.get(names.rationale), Segment.RATIONALE),
            ("assistant", row.get(names.answer), Segment.ANSWER),
        ]
        if all(piece[1] is None for piece in pieces):
            wanted = f"{names.prompt!r}, {names.rationale!r}, {names.answer!r}, {names.text!r} or {names.messages!r}"
            raise CorpusError(
                f"{where}: none of the fields {wanted} is there, only {sorted(row)}; name yours under corpus.fields"
            )
    for _, content, segment in pieces:
        if content is not None and not isinstance(content, str):
            raise CorpusError(f"{where}: the {segment.name.lower()} is not a string but {type(content).__name__}")
    return _assemble([p for p in pieces if p[1]], settings.separator, _sample_id(row, names, where), where)


def _message_pieces(messages: Any, where: str) -> list[tuple[str, Any, Segment]]:
    try:
        pairs = [(str(m["role"]), m["content"]) for m in messages]
    except (TypeError, KeyError):
        raise CorpusError(f"{where}: messages must be a list of objects with role and content") from None
    return [(role, content, Segment.ANSWER if role == "assistant" else Segment.PROMPT) for role, content in pairs]


def _sample_id(row: Row, names: FieldNames, where: str) -> str:
    value = row.get(names.id)
    if value is None:
        return ""
    if not isinstance(value, str | int) or value == "":
        raise CorpusError(f"{where}: the id must be a string or a whole number, not {value!r}")
    return str(value)


def _assemble(pieces: list[tuple[str, str, Segment]], separator: str, sample_id: str, where: str) -> Record:
    text, segments, turns = "", [], list[tuple[str, int, int]]()
    for number, (role, content, segment) in enumerate(pieces):
        start = len(text)
        if number:
            text += separator
        content_start = len(text)
        text += unicodedata.normalize("NFC", content)
        segments.append((start, len(text), segment))
        if turns and turns[-1][0] == role == "assistant" and segment == Segment.ANSWER:
            turns[-1] = (role, turns[-1][1], len(text))  # Rationale and answer are one message.
        else:
            turns.append((role, content_start, len(text)))
    if not text.strip():
        raise CorpusError(f"{where}: the record is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CorpusError(f"{where}: the text holds half of a surrogate pair, which is not valid Unicode") from None
    return Record(sample_id, text, tuple(segments), tuple(turns))


def _hold_out(
    pairs: list[tuple[Record, tuple[str, Row]]], settings: HeldoutSettings, path: str
) -> list[tuple[Record, tuple[str, Row]]]:
    keys = []
    for record, (where, row) in pairs:
        if settings.group is None:
            keys.append(record.sample_id)
        elif row.get(settings.group) is None:
            raise CorpusError(f"{where}: there is no field {settings.group!r}, named by corpus.heldout.group")
        else:
            keys.append(str(row[settings.group]))
    known = sorted(set(keys))
    if settings.values is not None:
        if missing := sorted(set(settings.values) - set(known)):
            raise CorpusError(
                f"corpus {path}: no record has {settings.group} {missing[0]!r}, named by corpus.heldout.values"
            )
        chosen = set(settings.values)
    else:
        assert settings.ratio is not None
        count = max(1, round(settings.ratio * len(known)))
        if count >= len(known):
            raise CorpusError(
                f"corpus {path}: {len(known)} samples or groups are too few to hold out {settings.ratio:g}"
            )
        chosen = set(random.Random(settings.seed).sample(known, count))
    split: dict[bool, Literal[Split.TRAIN, Split.HELDOUT]] = {True: Split.HELDOUT, False: Split.TRAIN}
    return [
        (replace(record, split=split[key in chosen]), place) for (record, place), key in zip(pairs, keys, strict=True)
    ]
