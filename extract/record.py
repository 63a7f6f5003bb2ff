"""One sample of the corpus, and its canonical text.

The *canonical text* of a record is what every model reads; it is in Unicode's composed form (NFC), because some
tokenizers compose it anyway and byte spans must refer to one text. Segments come from the record's fields, never from
words in the text. A separator between two fields belongs to the segment that follows it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import CorpusError
from ..store import Segment, Split, digest_json


@dataclass(frozen=True)
class Record:
    """One sample of the corpus."""

    sample_id: str
    text: str
    """The canonical text."""
    segments: tuple[tuple[int, int, Segment], ...]
    """Character ranges of the canonical text, adjoining, that cover all of it."""
    turns: tuple[tuple[str, int, int], ...]
    """Chat role and character range of each text that a chat template renders; of a record with `messages` one for
    each non-empty part, in the order of `messages.parts_of`."""
    split: Split = Split.TRAIN
    messages: tuple[dict[str, Any], ...] = ()
    """The messages as the record has them, in NFC; empty if the record is not a chat."""
    steps: tuple[tuple[int, int], ...] = ()
    """UTF-8 byte ranges of the rationale's steps in the canonical text; empty if they are not known."""

    @property
    def num_bytes(self) -> int:
        """Length of the canonical text in UTF-8 bytes."""
        return len(self.text.encode())

    @property
    def content(self) -> list[Any]:
        """The fields that determine the tokens and segments of the record, as JSON values."""
        content: list[Any] = [self.text, self.segments, self.turns]
        # Plain messages follow from text and turns; so the digest of a plain chat says nothing more.
        if not all(map(_is_plain, self.messages)):
            content.append({"messages": self.messages})
        if self.steps:
            content.append({"steps": self.steps})
        return content

    @cached_property
    def digest(self) -> str:
        """Digest of id, content and split."""
        text, segments, turns, *more = self.content
        return digest_json([self.sample_id, text, segments, turns, int(self.split), *more])


@dataclass(frozen=True)
class Piece:
    """One stretch of a record's text, from one field."""

    role: str
    text: str
    segment: Segment
    column: str
    """Field of the file that it comes from."""
    glue: str | None = None
    """Text between the piece before and this one; the corpus's separator if None."""
    same_turn: bool = False
    """Belongs to the message of the piece before."""
    steps: tuple[str, ...] | None = None
    """The steps that `text` consists of, in order; None if they are not known."""


def assemble(
    pieces: Sequence[Piece],
    separator: str,
    sample_id: str,
    where: str,
    messages: tuple[dict[str, Any], ...] = (),
) -> Record:
    """Joins pieces to a record.

    Args:
        pieces: in the order of the text; empty ones are left out.
        separator: text between two pieces.
        sample_id: id of the sample; empty for a digest of the content.
        where: file and line, for messages.
        messages: of a chat.

    Raises:
        CorpusError: if the text is empty, or is not valid Unicode.
    """
    text = ""
    segments: list[tuple[int, int, Segment]] = []
    turns: list[tuple[str, int, int]] = []
    steps: list[tuple[int, int]] = []
    for piece in pieces:
        if not piece.text:
            continue
        start = len(text)
        if text:
            text += separator if piece.glue is None else piece.glue
        content_start = len(text)
        text += unicodedata.normalize("NFC", piece.text)
        segments.append((start, len(text), piece.segment))
        if turns and piece.same_turn and turns[-1][0] == piece.role:
            turns[-1] = (piece.role, turns[-1][1], len(text))
        else:
            turns.append((piece.role, content_start, len(text)))
        steps += _step_ranges(text, content_start, piece.steps or ())
    if not text.strip():
        raise CorpusError(f"{where}: the record is empty. Remove it, or name its fields under corpus.fields.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CorpusError(
            f"{where}: the text holds half of a surrogate pair, which is not valid Unicode. Repair the record."
        ) from None
    byte_steps = tuple((_num_bytes(text, start), _num_bytes(text, stop)) for start, stop in steps)
    return Record(sample_id, text, tuple(segments), tuple(turns), messages=messages, steps=byte_steps)


def _step_ranges(text: str, start: int, steps: Sequence[str]) -> list[tuple[int, int]]:
    """Character ranges of the steps, which follow each other in `text` from `start` on."""
    ranges = []
    for step in steps:
        composed = unicodedata.normalize("NFC", step)
        at = text.find(composed, start)
        if at >= 0 and composed:
            start = at + len(composed)
            ranges.append((at, start))
    return ranges


def _num_bytes(text: str, stop: int) -> int:
    return stop if text.isascii() else len(text[:stop].encode())


def _is_plain(message: dict[str, Any]) -> bool:
    return message.keys() == {"role", "content"} and bool(message["content"])
