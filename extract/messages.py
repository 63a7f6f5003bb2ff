"""Chats: which texts of a message belong to the canonical text, and to which segment.

A message stays as the record has it: an empty system prompt stays empty, two assistant turns stay two. Its *parts* are
the strings that a chat template renders as they are: the reasoning and the content. What the assistant reasons is
rationale, what else it says is answer, and all other roles are prompt. A tool call is written by each chat template in
its own way, so it belongs to the template's text and not to the canonical one.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import CorpusError
from ..store import Segment
from .record import Piece

REASONING: Final = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's reasoning, as different servers and templates name them."""
WEIGHT: Final = "weight"
"""Key of an assistant's message that is 0 if it is context that is not to be learned, as OpenAI's format has it."""
MESSAGE_KEYS: Final = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", WEIGHT, *REASONING})
"""Keys of a message that are read; a chat template gets the others too, but no text of them is aligned."""
_THOUGHT: Final = re.compile(r"\s*<think>\s*\S.*?</think>", re.DOTALL)
"""A thought with text in it, at the beginning of a message."""
_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Roles of ShareGPT, as chat templates name them."""


@dataclass(frozen=True)
class Part:
    """One string of a message that belongs to the canonical text."""

    message: int
    """Number of the message."""
    path: tuple[str | int, ...]
    """Keys that lead to it inside the message."""
    role: str
    text: str


def read_messages(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...]:
    """Checks the messages of a record.

    Args:
        value: of the field.
        column: name of the field.
        where: file and line.

    Returns:
        The messages in NFC; keys without a value, which Parquet adds, are left out.

    Raises:
        CorpusError: naming the message and the key.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(m, dict) and m.get("role") for m in value):
        raise CorpusError(f"{where}: {column} must be a list of objects with role and content, not {_short(value)}.")
    return tuple(_checked(m, f"{where}: {column}[{number}]") for number, m in enumerate(value))


def from_sharegpt(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...]:
    """The messages of a ShareGPT conversation, whose entries have `from` and `value`.

    Raises:
        CorpusError: naming the entry and the key.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(m, dict) for m in value):
        raise CorpusError(f"{where}: {column} must be a list of objects with from and value, not {_short(value)}.")
    if all("from" not in entry for entry in value):
        return read_messages(value, column, where)
    messages = []
    for number, entry in enumerate(value):
        role = entry.get("from")
        if role not in _ROLES:
            raise CorpusError(
                f"{where}: {column}[{number}].from is {_short(role)}. Use one of {', '.join(_ROLES)}, or convert the "
                "record to messages."
            )
        others = {key: value for key, value in entry.items() if key not in ("from", "value")}
        messages.append({**others, "role": _ROLES[role], "content": entry.get("value")})
    return read_messages(messages, column, where)


def parts_of(messages: Sequence[dict[str, Any]]) -> Iterator[Part]:
    """The parts of all messages that have text, in the order in which templates render them."""
    for number, message in enumerate(messages):
        for path, text in message_texts(message):
            if text:
                yield Part(number, path, str(message["role"]), text)


def message_pieces(messages: Sequence[dict[str, Any]], column: str) -> list[Piece]:
    """The pieces of the canonical text, one turn for each part."""
    pieces = []
    for part in parts_of(messages):
        if not is_learned(messages[part.message]):
            pieces.append(Piece(part.role, part.text, Segment.PROMPT, column))
        elif part.path[0] in REASONING:
            pieces.append(Piece(part.role, part.text, Segment.RATIONALE, column))
        elif thought := _THOUGHT.match(part.text):
            pieces.append(Piece(part.role, thought[0], Segment.RATIONALE, column))
            rest = part.text[thought.end() :]
            pieces.append(Piece(part.role, rest, Segment.ANSWER, column, glue="", same_turn=True))
        else:
            pieces.append(Piece(part.role, part.text, Segment.ANSWER, column))
    return pieces


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether the student is trained to write this message."""
    return message.get("role") == "assistant" and message.get(WEIGHT, 1) != 0


def unread_keys(messages: Sequence[dict[str, Any]]) -> set[str]:
    """Keys of the messages from which no text is aligned."""
    return {str(key) for message in messages for key in message.keys() - MESSAGE_KEYS}


def message_texts(message: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield the strings of a message that belong to the canonical text, with the keys that lead to each, in order."""
    for key in (*REASONING, "content"):
        value = message.get(key)
        if isinstance(value, str):
            yield (key,), value
        elif key == "content" and isinstance(value, list | tuple):
            for number, part in enumerate(value):
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    yield (key, number, "text"), part["text"]


def _checked(message: dict[str, Any], where: str) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    for key in ("role", *REASONING):
        if not isinstance(kept.get(key, ""), str):
            raise CorpusError(f"{where}.{key} must be a string, not {type(kept[key]).__name__}.")
    _check_content(kept.get("content"), where)
    if kept.get(WEIGHT, 1) not in (0, 1):
        raise CorpusError(f"{where}.{WEIGHT} is {_short(kept[WEIGHT])}. Use 1, or 0 for a turn that is not learned.")
    calls = kept.get("tool_calls", [])
    if not isinstance(calls, list | tuple):
        raise CorpusError(f"{where}.tool_calls must be a list, not {type(calls).__name__}.")
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise CorpusError(f"{where}.tool_calls[{number}] must have a function with a name, not {_short(call)}.")
    if kept.get("content") is None and not calls and not any(key in kept for key in REASONING):
        raise CorpusError(f"{where}.content is missing. Give a string; an empty one is kept as it is.")
    composed: dict[str, Any] = _composed(kept)
    try:
        json.dumps(composed, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        reason = "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else str(error)
        raise CorpusError(f"{where}: a value is not JSON: {reason}. Repair the record.") from None
    return composed


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise CorpusError(f"{where}.content must be a string, not {type(content).__name__}.")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise CorpusError(f"{where}.content[{number}] must be text, not {_short(part)}. Remove the record.")


def _composed(value: Any) -> Any:
    """The value with every string in NFC."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, dict):
        return {_composed(key): _composed(item) for key, item in value.items()}
    return [_composed(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
