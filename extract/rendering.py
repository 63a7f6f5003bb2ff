"""Where a rendered conversation holds the characters of a record.

Each character of the messages is replaced by a private one of its own and the conversation is rendered again: whatever
the template does to a message, each character then says where it came from. The result counts only if putting the
characters back gives the real rendering, so nothing is assumed of a template. A template may also look into a message
(Qwen3's looks for `</think>`); then the strings that occur in the template's program are left as they are.

Legend: `joined` is all text of the messages, one field behind the other; `rendered` the text that the model reads.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from ..errors import CorpusError
from .chat import ChatTemplate, Message
from .messages import is_learned, message_texts
from .record import Record

_PRIVATE: Final = [*map(chr, range(0xF0000, 0xFFFFE)), *map(chr, range(0x100000, 0x10FFFE))]
"""Characters of Unicode's supplementary private use areas, which no template writes."""

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Rendering:
    """A record's conversation as the model reads it."""

    text: str
    regions: list[tuple[int, int, int]]
    """`(start, stop, canonical start)` in characters: text of the record inside `text`, in order."""
    written: list[tuple[int, int]]
    """Character ranges of `text` that an assistant writes, from the end of its header to the end of its turn."""
    ends: str
    """Template text with which the last assistant's turn ends; empty if the template ends it with nothing."""
    asks: bool
    """Whether the student is trained to write the last message."""


@dataclass(frozen=True)
class _Field:
    """One text of one message."""

    message: int
    path: tuple[str | int, ...]
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"messages[{self.message}]" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.path)


def render_record(template: ChatTemplate, record: Record) -> Rendering:
    """Render a record's messages and locate its canonical text in the result.

    Raises:
        CorpusError: if the template leaves out, changes, repeats, reorders or merges what the messages hold; names the
            field.
    """
    messages = _composed(record.messages) if record.messages else _turns(record)
    flat = [_flat(message) for message in messages]
    try:
        try:
            placement = _Placement(template, messages, record)
        except CorpusError:
            if flat == messages:
                raise
            placement = _Placement(template, flat, record)  # Many templates read strings alone.
        return placement.rendering()
    except CorpusError as error:
        raise CorpusError(f"sample {record.sample_id!r}: {error}") from None


class _Placement:
    """One record under one template."""

    def __init__(self, template: ChatTemplate, messages: list[Message], record: Record) -> None:
        self.template, self.messages, self.record = template, messages, record
        self.fields = list(_fields(messages))
        self.joined = "".join(_get(messages[field.message], field.path) for field in self.fields)
        self.rendered = template.render(messages)
        self.places = self._places()
        """`[len(joined)]`: where in `rendered` each character is; -1 where it is not."""

    def rendering(self) -> Rendering:
        canonical = self._canonical()
        self._refuse_left_out(canonical)
        self._refuse_merged()
        both = np.flatnonzero((self.places >= 0) & (canonical >= 0))
        breaks = np.flatnonzero((np.diff(self.places[both]) != 1) | (np.diff(canonical[both]) != 1)) + 1
        runs = [run for run in np.split(both, breaks) if len(run)]
        regions = [(int(self.places[r[0]]), int(self.places[r[-1]]) + 1, int(canonical[r[0]])) for r in runs]
        asks = is_learned(self.messages[-1])
        return Rendering(self.rendered, regions, self._written(), self.template.turn_end.final if asks else "", asks)

    # Where the characters are.

    def _places(self) -> Indices:
        constants = self.template.constants
        marked_up = [c for c in constants if not c.strip().isalnum()]
        for kept in dict.fromkeys(map(tuple, ([], marked_up, constants))):
            anchors = self._anchors(kept)
            if anchors is not None:
                return self._between(anchors)
        raise CorpusError(
            "the chat template changes the text of a message, so that byte spans cannot be exact. Set "
            "chat_template: false, or change the message"
        )

    def _anchors(self, kept: Sequence[str]) -> list[tuple[int, int]] | None:
        """Places in `rendered` and `joined` of single characters; None if the template heeds what was replaced.

        Args:
            kept: strings that are not replaced where they occur in a message.
        """
        plain = np.zeros(len(self.joined), np.bool_)
        for match in re.finditer("|".join(map(re.escape, kept)), self.joined) if kept else ():
            plain[slice(*match.span())] = True
        used = {c for c in self.joined if c >= _PRIVATE[0]}
        private = [c for c in _PRIVATE if c not in used] if used else _PRIVATE
        replaced = [i for i, c in enumerate(self.joined) if not plain[i] and not c.isspace()]
        replaced = replaced[:: 1 + len(replaced) // len(private)]
        marked, origin = list(self.joined), {}
        for mark, index in zip(private, replaced, strict=False):
            marked[index], origin[mark] = mark, index
        text = "".join(marked)
        messages = deepcopy(self.messages)
        for field in self.fields:
            _set(messages[field.message], field.path, text[field.start : field.stop])
        try:
            rendered = self.template.render(messages)
        except CorpusError:  # The real messages could be rendered: the template heeds what was replaced.
            return None
        if rendered.translate({ord(mark): self.joined[index] for mark, index in origin.items()}) != self.rendered:
            return None
        anchors = [(place, origin[c]) for place, c in enumerate(rendered) if c in origin]
        for (_, first), (_, second) in pairwise(anchors):
            if second <= first:
                name = self._field_at(second).name
                raise CorpusError(
                    f"{name}: the chat template repeats or reorders its text, so that byte spans cannot "
                    "be exact. Set chat_template: false"
                )
        return anchors

    def _between(self, anchors: list[tuple[int, int]]) -> Indices:
        """Places of all characters: those next to an anchor, and words that stand between two."""
        places = np.full(len(self.joined), -1, np.int64)
        ends = [(-1, -1), *anchors, (len(self.rendered), len(self.joined))]
        for place, index in anchors:
            places[index] = place
        for (before, low), (after, high) in pairwise(ends):
            start, stop, first, last = low + 1, high, before + 1, after
            if start == stop:
                continue
            left = self._field_at(low).stop if low >= 0 else 0
            right = self._field_at(high).start if high < len(self.joined) else stop
            while start < min(stop, left) and first < last and self.joined[start] == self.rendered[first]:
                places[start] = first
                start, first = start + 1, first + 1
            while max(start, right) < stop and first < last and self.joined[stop - 1] == self.rendered[last - 1]:
                stop, last = stop - 1, last - 1
                places[stop] = last
            for word in self._words(start, stop):
                found = self.rendered.find(self.joined[word], first, last)
                if found >= 0:
                    first = found + word.stop - word.start
                    places[word] = np.arange(found, first)
        return places

    def _words(self, start: int, stop: int) -> Iterator[slice]:
        for field in self.fields:
            low, high = max(start, field.start), min(stop, field.stop)
            for match in re.finditer(r"\S+", self.joined[low:high] if low < high else ""):
                yield slice(low + match.start(), low + match.end())

    def _canonical(self) -> Indices:
        """`[len(joined)]`: where in the canonical text each character is; -1 where it is not."""
        canonical = np.full(len(self.joined), -1, np.int64)
        position = 0
        for _, turn_start, turn_stop in self.record.turns:
            for start, stop in self._pieces(turn_start, turn_stop):
                piece = self.record.text[start:stop]
                found = self.joined.find(piece, position)
                if found < 0:
                    raise CorpusError(f"{piece[:40]!r} is in no message. This is a fault of the corpus")
                canonical[found : found + len(piece)] = np.arange(start, stop)
                position = found + len(piece)
        return canonical

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The turn as one piece if a message holds it, or else its segments, without the space around them."""
        if self.record.text[start:stop] in self.joined:
            yield start, stop
            return
        for low, high, _ in self.record.segments:
            low, high = max(start, low), min(stop, high)
            piece = self.record.text[low:high]
            if piece.strip():
                yield low + len(piece) - len(piece.lstrip()), high - len(piece) + len(piece.rstrip())

    def _field_at(self, index: int) -> _Field:
        return next(field for field in self.fields if field.start <= index < field.stop)

    # What a template may not do.

    def _refuse_left_out(self, canonical: Indices) -> None:
        for index in np.flatnonzero((canonical >= 0) & (self.places < 0)).tolist():
            if not self.joined[index].isspace():
                field = self._field_at(index)
                text = self.joined[index : min(field.stop, index + 40)]
                self._refuse(field.name, f"leaves out {text!r}")
        for number, message in enumerate(self.messages):
            if not self._placed(number):
                rest = self.messages[:number] + self.messages[number + 1 :]
                if rest and not self._differs(rest):
                    content = message.get("content")
                    self._refuse(
                        f"messages[{number}].content", f"leaves out the {message.get('role')} message {content!r}"
                    )
            for key in ("tool_calls", "function_call"):
                calls = message.get(key) or []
                for call in range(len(calls)) if isinstance(calls, list) else [None]:
                    fewer = [] if call is None else calls[:call] + calls[call + 1 :]
                    changed = {**message, key: fewer} if fewer else {k: v for k, v in message.items() if k != key}
                    if not self._differs([*self.messages[:number], changed, *self.messages[number + 1 :]]):
                        name = f"messages[{number}].{key}" + ("" if call is None else f"[{call}]")
                        self._refuse(name, "leaves it out")

    def _refuse_merged(self) -> None:
        for number, (one, two) in enumerate(pairwise(self.messages)):
            first, second = self._placed(number), self._placed(number + 1)
            if (
                one.get("role") == two.get("role")
                and first
                and second
                and not self.rendered[first[1] : second[0]].strip()
            ):
                self._refuse(f"messages[{number + 1}]", f"merges two messages of the role {one.get('role')} into one")

    def _refuse(self, name: str, fault: str) -> None:
        raise CorpusError(
            f"{name}: the chat template {fault}. Change the record, use a template that renders it, or "
            "set chat_template: false"
        )

    def _differs(self, messages: list[Message]) -> bool:
        try:
            return self.template.render(messages) != self.rendered
        except CorpusError:  # Roles must alternate, for example.
            return True

    def _placed(self, number: int) -> tuple[int, int] | None:
        """Where the text of a message begins and ends in `rendered`; None if it has none there."""
        spans = [self.places[field.start : field.stop] for field in self.fields if field.message == number]
        placed = np.concatenate([span[span >= 0] for span in spans]) if spans else np.zeros(0, np.int64)
        return (int(placed.min()), int(placed.max()) + 1) if len(placed) else None

    # What the assistant writes.

    def _written(self) -> list[tuple[int, int]]:
        header, end = self.template.generation_prompt, self.template.turn_end
        found: list[tuple[int, int]] = []
        reached = 0
        for number, message in enumerate(self.messages):
            placed = self._placed(number)
            if message.get("role") == "assistant":
                later = (self._placed(n) for n in range(number + 1, len(self.messages)))
                limit = next((next_placed[0] for next_placed in later if next_placed), len(self.rendered))
                first = placed[0] if placed else limit
                at = (
                    self.rendered.rfind(header, reached, first)
                    if placed
                    else self.rendered.find(header, reached, limit)
                )
                start = at + len(header) if header and at >= 0 else first
                text_stop = placed[1] if placed else start
                closing = end.final if number == len(self.messages) - 1 else end.inner
                at = self.rendered.find(closing, text_stop, limit) if closing else -1
                stop = at + len(closing) if at >= 0 else text_stop
                if start < stop and is_learned(message):
                    found.append((start, stop))
                reached = stop
            elif placed:
                reached = placed[1]
        return found


def _turns(record: Record) -> list[Message]:
    return [{"role": role, "content": record.text[start:stop]} for role, start, stop in record.turns]


def _flat(message: Message) -> Message:
    """The message with a list of texts as its content joined to one string, as templates join them."""
    content = message.get("content")
    if not isinstance(content, list) or not all(isinstance(part, dict) and "text" in part for part in content):
        return message
    return message | {"content": "".join(str(part["text"]) for part in content)}


def _composed(messages: Sequence[Message]) -> list[Message]:
    """The messages with their texts in Unicode's composed form, as the canonical text is."""
    composed = [deepcopy(dict(message)) for message in messages]
    for field in list(_fields(composed)):
        text = _get(composed[field.message], field.path)
        _set(composed[field.message], field.path, unicodedata.normalize("NFC", text))
    return composed


def _fields(messages: Sequence[Message]) -> Iterator[_Field]:
    """The texts of the messages, in the order in which they are read."""
    start = 0
    for number, message in enumerate(messages):
        for path, text in message_texts(message):
            stop = start + len(text)
            yield _Field(number, path, start, stop)
            start = stop


def _get(value: Any, path: Sequence[str | int]) -> str:
    for step in path:
        value = value[step]
    return str(value)


def _set(value: Any, path: Sequence[str | int], text: str) -> None:
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = text
