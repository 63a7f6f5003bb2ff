"""From a record to token ids, each with its exact UTF-8 byte range in the canonical text.

Byte spans are what makes two tokenizers comparable. They are exact where the tokens' bytes, joined, are the text's
bytes (byte-level BPE, SentencePiece with byte fallback); where a normaliser changed the text, the tokenizer's own
character offsets are used and tokens inside one character share its range: the last one has it, the others are empty.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from ..errors import CorpusError
from ..store import Segment
from .corpus import Record
from .messages import parts_of

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
    """End every sample with the tokenizer's end-of-sequence token."""

    def encode(self, record: Record) -> Tokens:
        """Tokenises a record.

        Raises:
            CorpusError: if the chat template changes the messages' text, so that spans cannot be exact.
        """
        regions = [(0, len(record.text), 0)]
        text = record.text
        if self.chat_template:
            text, regions = self._templated(record)
        ids, spans = self._encode_text(text, add_special_tokens=not self.chat_template)
        spans = _to_canonical(spans, _byte_regions(text, record.text, regions))
        eos = self.tokenizer.eos_token_id
        if self.add_eos and eos is not None and (len(ids) == 0 or ids[-1] != eos):
            ids, spans = np.append(ids, np.int32(eos)), np.concatenate([spans, np.zeros((1, 2), np.int32)])
        return Tokens(ids, np.arange(len(ids), dtype=np.int32), spans, _segments(spans, record))

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

    def _templated(self, record: Record) -> tuple[str, list[tuple[int, int, int]]]:
        """The rendered chat, and `(start, stop, canonical start)` in characters of each message inside it."""
        contents = [record.text[start:stop] for _, start, stop in record.turns]
        marks = [f"\ue000{number}\ue001" for number in range(len(contents))]
        with_marks, rendered = (self._render(_messages(record, texts)) for texts in (marks, contents))
        regions, out, position = [], "", 0
        for mark, content, (_, start, _) in zip(marks, contents, record.turns, strict=True):
            at = with_marks.find(mark, position)
            if at < 0:
                raise CorpusError(
                    f"sample {record.sample_id!r}: the chat template leaves out a message; set chat_template: false"
                )
            out += with_marks[position:at]
            kept = content if rendered.startswith(content, len(out)) else content.strip()
            begin = start + content.find(kept)
            regions.append((len(out), len(out) + len(kept), begin))
            out, position = out + kept, at + len(mark)
        out += with_marks[position:]
        if out != rendered:
            raise CorpusError(
                f"sample {record.sample_id!r}: the chat template changes the text of a message, so that byte spans "
                "cannot be exact; set chat_template: false"
            )
        return rendered, regions

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:
            roles = [message["role"] for message in messages]
            raise CorpusError(f"the chat template cannot render roles {roles}: {error}") from None

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
    def _added(self) -> dict[int, str]:
        return {number: str(token) for number, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _byte_level(self) -> bool:
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])


def _messages(record: Record, texts: list[str]) -> list[dict[str, Any]]:
    """The record's messages with other texts in the place of the parts that are aligned."""
    if not record.messages:
        return [{"role": role, "content": text} for (role, _, _), text in zip(record.turns, texts, strict=True)]
    messages = deepcopy(list(record.messages))
    for part, text in zip(parts_of(record.messages), texts, strict=True):
        holder: Any = messages[part.message]
        for key in part.path[:-1]:
            holder = holder[key]
        holder[part.path[-1]] = text
    return messages


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
