"""From a record to token ids, each with its exact UTF-8 byte range in the canonical text.

Byte spans are what makes two tokenizers comparable. They are exact where the tokens' bytes, joined, are the text's
bytes (byte-level BPE, SentencePiece with byte fallback); where a normaliser changed the text, the tokenizer's own
character offsets are used and tokens inside one character share its range: the last one has it, the others are empty.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from ..store import Segment
from .chat import ChatTemplate
from .corpus import Record
from .rendering import render_record

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
_Spans = np.ndarray[tuple[int, int], np.dtype[np.int32]]


@dataclass(frozen=True)
class Tokens:
    """One tokenised record; arrays of one length."""

    input_ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    positions: np.ndarray[tuple[int], np.dtype[np.int32]]
    spans: _Spans
    segments: np.ndarray[tuple[int], np.dtype[np.uint8]]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Encoder:
    """Turns records into tokens of one tokenizer."""

    tokenizer: Any
    """A fast Hugging Face tokenizer."""
    chat_template: bool = False
    """Wrap the record's turns in the tokenizer's chat template."""
    add_eos: bool = False
    """End every sample with the tokenizer's end-of-sequence token, where the chat template does not end it."""
    chat_template_date: datetime.date | None = None
    """Date that the chat template prints as today's."""

    def encode(self, record: Record) -> Tokens:
        """Tokenise a record.

        Raises:
            CorpusError: if the chat template cannot render the record, or not so that spans are exact.
            RecipeError: if the chat template prints today's date and none is set.
        """
        if self.chat_template:
            return self._encode_chat(record)
        ids, spans = self._encode_text(record.text, add_special_tokens=True)
        segments = _segments(spans, record)
        if self._lacks_eos(ids):
            ids, spans, segments = self._with_eos(ids, spans, segments, Segment.NONE)
        return Tokens(ids, np.arange(len(ids), dtype=np.int32), spans, segments)

    def count(self, records: Sequence[Record]) -> list[int]:
        """Return the number of tokens of each record, as `encode` gives it; several records are faster than one.

        Raises:
            CorpusError: if the chat template cannot render a record.
            RecipeError: if the chat template prints today's date and none is set.
        """
        if not records:
            return []
        renderings = [render_record(self.template, record) for record in records] if self.chat_template else []
        texts = [rendering.text for rendering in renderings] or [record.text for record in records]
        encoded = self.tokenizer(
            texts,
            add_special_tokens=not self.chat_template,
            return_attention_mask=False,
            truncation=False,
            padding=False,
            verbose=False,
        )
        may_lack = [rendering.asks and not self.stop_ids for rendering in renderings] or [True] * len(records)
        return [
            len(ids) + (may_lack_eos and self._lacks_eos(ids))
            for ids, may_lack_eos in zip(encoded["input_ids"], may_lack, strict=True)
        ]

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer, self.chat_template_date)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an assistant's turn under the chat template; empty without one."""
        if not self.chat_template:
            return []
        end = self.template.turn_end.final
        ids = self.tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
        return [int(ids[-1])] if ids and int(ids[-1]) in self._special_ids else []

    def _encode_chat(self, record: Record) -> Tokens:
        rendering = render_record(self.template, record)
        ids, places = self._encode_text(rendering.text, add_special_tokens=False)
        spans = _to_canonical(places, _byte_regions(rendering.text, record.text, rendering.regions))
        segments = _segments(spans, record)
        written = np.zeros(len(ids), np.bool_)
        for start, stop in rendering.written:
            low, high = (len(rendering.text[:at].encode()) for at in (start, stop))
            written |= (places[:, 0] >= low) & (places[:, 0] < high)
        lacks_end = rendering.asks and not self.stop_ids and self._lacks_eos(ids)
        if lacks_end and rendering.written:
            # The template ends a turn with no token of its own, so the model writes all up to the end of the sequence.
            written |= places[:, 0] >= len(rendering.text[: rendering.written[-1][1]].encode())
        segments[written & (spans[:, 0] == spans[:, 1])] = Segment.TURN
        if lacks_end:
            ids, spans, segments = self._with_eos(ids, spans, segments, Segment.TURN)
        return Tokens(ids, np.arange(len(ids), dtype=np.int32), spans, segments)

    def _lacks_eos(self, ids: Any) -> bool:
        eos = self.tokenizer.eos_token_id
        return self.add_eos and eos is not None and (len(ids) == 0 or ids[-1] != eos)

    def _with_eos(self, ids: Any, spans: _Spans, segments: Any, segment: Segment) -> tuple[Any, _Spans, Any]:
        return (
            np.append(ids, np.int32(self.tokenizer.eos_token_id)),
            np.concatenate([spans, np.zeros((1, 2), np.int32)]),
            np.append(segments, np.uint8(segment)),
        )

    def _encode_text(self, text: str, *, add_special_tokens: bool) -> tuple[Any, _Spans]:
        """Ids `[t]` and byte spans `[t, 2]` in `text`; empty spans for tokens that the post-processor added."""
        encoding = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
        ids = np.asarray(encoding["input_ids"], np.int32)
        content = np.flatnonzero(np.asarray(encoding["special_tokens_mask"]) == 0)
        spans = np.zeros((len(ids), 2), np.int32)
        pieces = [self._token_bytes(int(i)) for i in ids[content]]
        raw = text.encode()
        exact = _exact_spans(pieces, raw)
        if exact is None:
            exact = _offset_spans(pieces, [encoding["offset_mapping"][i] for i in content], text)
        spans[content] = exact
        return ids, spans

    def _token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that this token stands for; None if it stands for no definite bytes."""
        if token_id not in self._known_bytes:
            self._known_bytes[token_id] = self._look_up_bytes(token_id)
        return self._known_bytes[token_id]

    def _look_up_bytes(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None or token_id == self.tokenizer.unk_token_id:
            return None
        if self._byte_level:
            table = _byte_of_char()
            return bytes(table[c] for c in token) if all(c in table for c in token) else None
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace("\u2581", " ").encode()

    @cached_property
    def _known_bytes(self) -> dict[int, bytes | None]:
        return {}

    @cached_property
    def _special_ids(self) -> set[int]:
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return special | {int(number) for number in self.tokenizer.all_special_ids}

    @cached_property
    def _added(self) -> dict[int, str]:
        return {number: str(token) for number, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _byte_level(self) -> bool:
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])


def _exact_spans(pieces: list[bytes | None], raw: bytes) -> _Spans | None:
    """Spans by adding up byte lengths, if the tokens' bytes are the text's (SentencePiece may add a leading space)."""
    if any(piece is None for piece in pieces):
        return None
    known = [piece for piece in pieces if piece is not None]
    joined = b"".join(known)
    extra = 1 if joined == b" " + raw else 0
    if not extra and joined != raw:
        return None
    stops = np.cumsum([len(piece) for piece in known], dtype=np.int64) - extra
    starts = np.concatenate([[0], stops[:-1]]) if known else stops
    return np.maximum(np.stack([starts, stops], axis=1), 0).astype(np.int32)


def _offset_spans(pieces: list[bytes | None], offsets: list[tuple[int, int]], text: str) -> _Spans:
    """Spans from character offsets; tokens that share characters are told apart by their bytes where these add up."""
    byte_at = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text], dtype=np.int64)])
    spans = np.zeros((len(pieces), 2), np.int32)
    first, reached = 0, 0
    while first < len(pieces):
        start, stop = offsets[first]
        last = first
        while last + 1 < len(pieces) and offsets[last + 1][0] < stop:
            last += 1
            stop = max(stop, offsets[last][1])
        low, high = max(int(byte_at[start]), reached), max(int(byte_at[stop]), reached)
        group = pieces[first : last + 1]
        lengths = [len(piece) for piece in group if piece is not None]
        if last == first:
            spans[first] = (low, high)
        elif len(lengths) == len(group) and sum(lengths) == high - low:
            ends = low + np.cumsum(lengths)
            spans[first : last + 1, 1], spans[first : last + 1, 0] = ends, ends - lengths
        else:
            spans[first:last], spans[last] = low, (low, high)
        first, reached = last + 1, high
    return _without_gaps(spans, len(text.encode()))


def _without_gaps(spans: _Spans, size: int) -> _Spans:
    """Bytes that a normaliser took from between tokens belong to the token before them, or to the first."""
    filled = np.flatnonzero(spans[:, 1] > spans[:, 0])
    if len(filled):
        spans[filled[0], 0] = 0
        spans[filled[:-1], 1] = spans[filled[1:], 0]
        spans[filled[-1], 1] = size
    return spans


def _byte_regions(text: str, canonical: str, regions: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same regions in bytes: `(start in text, stop in text, start in canonical text)`."""
    return [
        (len(text[:start].encode()), len(text[:stop].encode()), len(canonical[:begin].encode()))
        for start, stop, begin in regions
    ]


def _to_canonical(spans: _Spans, regions: list[tuple[int, int, int]]) -> _Spans:
    out = np.zeros_like(spans)
    for start, stop, begin in regions:
        clipped = np.clip(spans, start, stop)
        inside = clipped[:, 0] < clipped[:, 1]
        out[inside] = clipped[inside] - start + begin
    return out


def _segments(spans: _Spans, record: Record) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The segment that holds each token's last byte; `NONE` for tokens without text."""
    stops = np.array([len(record.text[:stop].encode()) for _, stop, _ in record.segments])
    kinds = np.array([int(kind) for _, _, kind in record.segments], np.uint8)
    segments = kinds[np.minimum(np.searchsorted(stops, spans[:, 1] - 1, side="right"), len(kinds) - 1)]
    return np.where(spans[:, 1] > spans[:, 0], segments, np.uint8(Segment.NONE)).astype(np.uint8)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted."""
    if not _BYTES:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [b for b in range(256) if b not in printable]
        _BYTES.update({chr(b): b for b in printable})
        _BYTES.update({chr(256 + number): b for number, b in enumerate(rest)})
    return _BYTES


_BYTES: dict[str, int] = {}
