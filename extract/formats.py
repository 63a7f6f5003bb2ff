"""The layouts of records that are read as they are.

A format is one reader and one line in `FORMATS`: the fields that a record must have, those it may have, and what they
become. The first format whose fields a record has reads it. Names given under `corpus.fields` replace the recognition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from ..errors import CorpusError
from ..store import Segment
from .corpus_settings import CorpusSettings, SplitSettings
from .messages import from_sharegpt, message_pieces, read_messages
from .record import Piece

Row = dict[str, Any]
GSM8K_MARK: Final = "####"
_PROMPT, _RATIONALE, _ANSWER = Segment.PROMPT, Segment.RATIONALE, Segment.ANSWER


@dataclass(frozen=True)
class Reading:
    """A record as a format reads it."""

    pieces: list[Piece]
    messages: tuple[dict[str, Any], ...] = ()


Read = Callable[[Row, str, str], Reading]
"""Reads a record; gets the record, its file and line, and the separator."""


@dataclass(frozen=True)
class Format:
    """One layout."""

    name: str
    line: str
    """How the fields are read, for people."""
    required: tuple[str, ...]
    read: Read
    optional: tuple[str, ...] = ()
    matches: Callable[[Row], bool] = lambda row: True
    """Condition on the values, beyond the presence of the required fields."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields that are read."""
        return self.required + self.optional

    def fits(self, row: Row) -> bool:
        """Whether a record has this layout."""
        return all(row.get(name) is not None for name in self.required) and self.matches(row)


# Readers


def _fields(prompt: str | None, rationale: str | None, answer: str | None) -> Read:
    """Reader of fields that are segments; a rationale that is a list is its steps."""

    def read(row: Row, where: str, separator: str) -> Reading:
        pieces = []
        if prompt is not None and row.get(prompt) is not None:
            pieces.append(Piece("user", _text(row, prompt, where), _PROMPT, prompt))
        if rationale is not None and isinstance(steps := row.get(rationale), list | tuple):
            checked = tuple(_step(step, f"{where}: {rationale}[{n}]") for n, step in enumerate(steps))
            pieces.append(Piece("assistant", separator.join(checked), _RATIONALE, rationale, steps=checked))
        elif rationale is not None and row.get(rationale) is not None:
            pieces.append(Piece("assistant", _text(row, rationale, where), _RATIONALE, rationale))
        if answer is not None and row.get(answer) is not None:
            pieces.append(Piece("assistant", _text(row, answer, where), _ANSWER, answer, same_turn=True))
        return Reading(pieces)

    return read


def _text_only(name: str) -> Read:
    def read(row: Row, where: str, separator: str) -> Reading:
        return Reading([Piece("assistant", _text(row, name, where), _ANSWER, name)])

    return read


def _messages(name: str) -> Read:
    def read(row: Row, where: str, separator: str) -> Reading:
        messages = read_messages(row[name], name, where)
        return Reading(message_pieces(messages, name), messages)

    return read


def _conversations(row: Row, where: str, separator: str) -> Reading:
    messages = from_sharegpt(row["conversations"], "conversations", where)
    system = row.get("system")
    if system is not None and not any(m["role"] == "system" for m in messages):
        messages = (*read_messages([{"role": "system", "content": system}], "system", where), *messages)
    return Reading(message_pieces(messages, "conversations"), messages)


def _chat_completion(row: Row, where: str, separator: str) -> Reading:
    messages = tuple(m for name in ("prompt", "completion") for m in read_messages(row[name], name, where))
    return Reading(message_pieces(messages, "completion"), messages)


def _preference(row: Row, where: str, separator: str) -> Reading:
    chosen = row["chosen"]
    if isinstance(chosen, str):
        return _fields("prompt", None, "chosen")(row, where, separator)
    messages = read_messages(chosen, "chosen", where)
    prompt = row.get("prompt")
    if prompt is not None and all(message["role"] == "assistant" for message in messages):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = (*read_messages(asked, "prompt", where), *messages)
    return Reading(message_pieces(messages, "chosen"), messages)


def _gsm8k(row: Row, where: str, separator: str) -> Reading:
    pieces = _fields("question", None, "answer")(row, where, separator).pieces
    return Reading(split_pieces(pieces, SplitSettings(field="answer", at=GSM8K_MARK), where))


def _alpaca(row: Row, where: str, separator: str) -> Reading:
    pieces = [Piece("user", _text(row, "instruction", where), _PROMPT, "instruction")]
    if row.get("input"):
        pieces.append(Piece("user", _text(row, "input", where), _PROMPT, "input", same_turn=True))
    pieces.append(Piece("assistant", _text(row, "output", where), _ANSWER, "output"))
    return Reading(pieces)


def _has_mark(row: Row) -> bool:
    answer = row["answer"]
    return isinstance(answer, str) and bool(re.search(r"\S\s*####\s*\S[^\n]*\s*$", answer))


def _is_chat(row: Row) -> bool:
    return not isinstance(row["prompt"], str) and not isinstance(row["completion"], str)


def _is_preference(row: Row) -> bool:
    return not isinstance(row["chosen"], str) or row.get("prompt") is not None


def _has_prompt_and_more(row: Row) -> bool:
    return row.get("prompt") is not None and any(row.get(name) is not None for name in ("rationale", "answer"))


def _has_steps(row: Row) -> bool:
    return isinstance(row["steps"], list | tuple)


def _has_any(row: Row) -> bool:
    return any(row.get(name) is not None for name in SEGMENT_FIELDS)


SEGMENT_FIELDS: Final = ("prompt", "rationale", "answer")
_BY_SEGMENT: Final = _fields(*SEGMENT_FIELDS)
FORMATS: Final[tuple[Format, ...]] = (
    Format("messages", "turns as they are", ("messages",), _messages("messages")),
    Format("ShareGPT", "turns from conversations", ("conversations",), _conversations, ("system",)),
    Format("text", "all of it is answer", ("text",), _text_only("text")),
    Format(
        "conversational prompt/completion",
        "turns from both",
        ("prompt", "completion"),
        _chat_completion,
        matches=_is_chat,
    ),
    Format(
        "prompt/completion",
        "the completion is the answer",
        ("prompt", "completion"),
        _fields("prompt", None, "completion"),
    ),
    Format(
        "prompt/rationale/answer", "one field for each segment", (), _BY_SEGMENT, SEGMENT_FIELDS, _has_prompt_and_more
    ),
    Format(
        "preference",
        "the chosen answer is the answer",
        ("chosen",),
        _preference,
        ("prompt",),
        _is_preference,
    ),
    Format(
        "GSM8K-AUG",
        "the rationale is the list of steps",
        ("question", "steps"),
        _fields("question", "steps", "answer"),
        ("answer",),
        _has_steps,
    ),
    *(
        Format(
            f"question/{name}/answer",
            "one field for each segment",
            ("question", name),
            _fields("question", name, "answer"),
            ("answer",),
        )
        for name in ("rationale", "cot")
    ),
    Format("GSM8K", f"rationale and answer split at {GSM8K_MARK}", ("question", "answer"), _gsm8k, matches=_has_mark),
    Format("question/answer", "there is no rationale", ("question", "answer"), _fields("question", None, "answer")),
    Format(
        "Alpaca",
        "the prompt is instruction and input, the answer is output",
        ("instruction", "output"),
        _alpaca,
        ("input",),
    ),
    Format("one segment", "prompt, rationale or answer alone", (), _BY_SEGMENT, SEGMENT_FIELDS, _has_any),
)
"""Recognised formats; the first that fits a record reads it."""


def formats_of(settings: CorpusSettings) -> list[Format]:
    """The formats that these settings allow: those of the named fields, or all."""
    named = settings.fields.content
    if not named:
        split = settings.text_split is not None  # Then GSM8K's own split would come first.
        return [known for known in FORMATS if not (split and known.read is _gsm8k)]
    formats = []
    if "messages" in named:
        formats.append(
            Format("messages", f"turns from {named['messages']}", (named["messages"],), _messages(named["messages"]))
        )
    if "text" in named:
        formats.append(Format("text", f"all of {named['text']} is answer", (named["text"],), _text_only(named["text"])))
    if set(named) - {"messages", "text"}:
        names = tuple(named.get(role, role) for role in SEGMENT_FIELDS)
        line = ", ".join(f"{role} from {name}" for role, name in zip(SEGMENT_FIELDS, names, strict=True))
        formats.append(
            Format(
                "named fields", line, (), _fields(*names), names, lambda row: any(row.get(n) is not None for n in names)
            )
        )
    return formats


def needed_columns(settings: CorpusSettings, present: Iterable[str]) -> list[str]:
    """The columns of a table that records are read from, in the order of the table."""
    columns, needed = list(present), {settings.fields.id or "id"}
    for known in formats_of(settings):
        if set(known.required) <= set(columns):
            needed.update(known.columns)
    if settings.heldout is not None and settings.heldout.group is not None:
        needed.add(settings.heldout.group)
    if settings.text_split is not None:
        needed.add(settings.text_split.field)
    return [name for name in columns if name in needed]


def read_row(
    row: Row, formats: list[Format], settings: CorpusSettings, where: str, present: Iterable[str]
) -> tuple[Format, Reading]:
    """Reads a record by the first format that fits, then applies the settings on its text.

    Args:
        row: the fields that were read.
        formats: to choose from.
        settings: of the corpus.
        where: file and line.
        present: all fields of the record, for messages.

    Raises:
        CorpusError: if none fits, or a field is not what the format says.
    """
    known = next((known for known in formats if known.fits(row)), None)
    if known is None:
        if settings.fields.content:
            problem = f"none of the fields {', '.join(repr(n) for f in formats for n in f.columns)} has a value"
        else:
            problem = "none of the known formats fits"
        field_names = sorted(ascii(name)[1:-1] for name in present)
        lists = [
            name for name, value in row.items() if isinstance(value, list) and isinstance(next(iter(value), None), dict)
        ]
        remedy = (
            f"{lists[0]!a} is a list of objects; if they are the records, save that list as the file."
            if lists
            else "Name yours under corpus.fields."
        )
        raise CorpusError(f"{where}: {problem}; the fields are {', '.join(field_names) or 'none'}. {remedy}")
    reading = known.read(row, where, settings.separator)
    if settings.text_split is not None or settings.answer_prefix or settings.drop_last_step:
        reading = replace(reading, pieces=_adjusted(reading, settings, where))
    return known, reading


def split_pieces(pieces: list[Piece], split: SplitSettings, where: str) -> list[Piece]:
    """Splits the piece that comes from one field into rationale and answer; the text stays the same.

    The answer begins with the white space before the mark. The steps of the rationale are its lines.

    Raises:
        CorpusError: if no piece comes from the field, or the mark is not in it.
    """
    number = next((n for n, piece in enumerate(pieces) if piece.column == split.field), None)
    if number is None:
        read = ", ".join(dict.fromkeys(piece.column for piece in pieces))
        raise CorpusError(f"{where}: corpus.split.field {split.field!r} is not read. Name one of {read}.")
    if any(piece.segment == _RATIONALE for piece in pieces):
        raise CorpusError(f"{where}: corpus.split gives a rationale, and the record has one already. Leave one out.")
    piece = pieces[number]
    at = piece.text.rfind(split.at)
    if at < 0:
        raise CorpusError(
            f"{where}: {split.field!r} does not contain {split.at!r}, at which rationale and answer are split. "
            "Change corpus.split.at, or remove the record."
        )
    rationale = piece.text[:at].rstrip()
    steps = tuple(line for line in rationale.split("\n") if line.strip())
    parts = [
        replace(piece, role="assistant", text=rationale, segment=_RATIONALE, same_turn=False, steps=steps),
        replace(piece, role="assistant", text=piece.text[len(rationale) :], segment=_ANSWER, glue="", same_turn=True),
    ]
    return [*pieces[:number], *parts, *pieces[number + 1 :]]


def _adjusted(reading: Reading, settings: CorpusSettings, where: str) -> list[Piece]:
    pieces = reading.pieces
    if reading.messages:
        key = "split" if settings.text_split else "answer_prefix" if settings.answer_prefix else "drop_last_step"
        raise CorpusError(f"{where}: corpus.{key} does not apply to messages. Remove it, or convert the records.")
    if settings.text_split is not None:
        pieces = split_pieces(pieces, settings.text_split, where)
    if settings.drop_last_step:
        pieces = [_without_last_step(p, settings.separator, where) if p.segment == _RATIONALE else p for p in pieces]
        if not any(piece.segment == _RATIONALE for piece in pieces):
            raise CorpusError(f"{where}: corpus.drop_last_step is set, and the record has no rationale.")
    if settings.answer_prefix:
        pieces = [_prefixed(p, settings.answer_prefix) if p.segment == _ANSWER else p for p in pieces]
    return pieces


def _without_last_step(piece: Piece, separator: str, where: str) -> Piece:
    if piece.steps is None:
        raise CorpusError(
            f"{where}: corpus.drop_last_step needs steps, and {piece.column!r} is plain text. Give a list of steps, or "
            "a field that corpus.split splits, whose lines are the steps."
        )
    kept = piece.steps[:-1]
    if piece.text == separator.join(piece.steps):
        return replace(piece, text=separator.join(kept), steps=kept)
    dropped = piece.text.rfind(piece.steps[-1]) if piece.steps else len(piece.text)
    return replace(piece, text=piece.text[:dropped].rstrip(), steps=kept)


def _prefixed(piece: Piece, prefix: str) -> Piece:
    text = piece.text.lstrip()
    if not text or text.startswith(prefix):
        return piece
    return replace(piece, text=piece.text[: len(piece.text) - len(text)] + prefix + text)


def _text(row: Row, name: str, where: str) -> str:
    value = row[name]
    if isinstance(value, list | dict):
        raise CorpusError(
            f"{where}: {name!r} must be a string, not {type(value).__name__}. Write one record for each value, as "
            "pandas does with to_json(orient='records', lines=True)."
        )
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {name!r} must be a string, not {type(value).__name__}. Write it as text.")
    return value


def _step(step: Any, where: str) -> str:
    if not isinstance(step, str):
        raise CorpusError(f"{where} must be a string, not {type(step).__name__}.")
    return step
