"""JSON that came from elsewhere, parsed so that no document can exhaust the stack, the memory or the clock.

Python's parser accepts what later code cannot handle: nesting that overflows the stack of a recursive walk, integers
that no array index holds, and a second value under the same key, which silently replaces the first. All are refused
here, at the one place that every reader passes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from ..errors import DamagedStoreError
from .files import read_small

JSON_BYTES: Final = 16 << 20
"""Size limit of a JSON file unless the reader states another: a manifest, a record, a card or a result has a few kB."""

LOG_BYTES: Final = 1 << 30
"""Size limit of a log, of a training's state or of generated text, which grow with its steps or prompts."""

MAX_DEPTH: Final = 64
"""Nesting limit. The deepest document that kava writes, a comparison with nested settings, has 10 levels."""

BYTES_PER_CONTAINER: Final = 256
"""A document has at most one array or object for so many bytes of its size limit; each takes some 100 bytes of memory
and time to build, so that `[[],[],...]` would cost far more than its size says."""

MAX_DIGITS: Final = 20
"""Digits of an integer: 2^64 - 1, the largest number in any array or checksum, has 20."""

MAX_FLOAT_CHARACTERS: Final = 400
"""Characters of a float: `repr` of a float64 has 24, a decimal expansion without exponent up to 309 digits."""

# Strings, also unterminated ones, are consumed whole by possessive quantifiers: linear time on any input.
_STRING_OR_BRACKET: Final = re.compile(r'"(?:[^"\\]++|\\(?:.|\Z))*+(?:"|\Z)|[\[{\]}]', re.DOTALL)
_LONG_NUMBER: Final = re.compile(rf"[0-9]{{{MAX_DIGITS}}}")


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """Return the value in a JSON file.

    Args:
        path: the file; neither a link nor a special file, see `read_small`.
        limit: its largest size in bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedStoreError: if it cannot be read or is not JSON within the limits of this module.
    """
    return parse_json(read_small(path, limit), path, limit)


def read_json_object(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; see `read_json`.

    Raises:
        DamagedStoreError: also if the file holds a value of another type.
    """
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise DamagedStoreError(f"{path} is not readable: it holds a {type(value).__name__}, not an object")
    return value


def read_json_lines(path: Path, limit: int) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines; see `read_json`.

    Raises:
        DamagedStoreError: also if a line holds a value of another type.
    """
    rows = []
    for number, line in enumerate(read_small(path, limit).splitlines(), 1):
        row = parse_json(line, f"{path} line {number}")
        if not isinstance(row, dict):
            raise DamagedStoreError(f"{path} line {number} is not readable: it holds a {type(row).__name__}")
        rows.append(row)
    return rows


def parse_json(data: bytes, where: Path | str, limit: int = JSON_BYTES) -> Any:
    """Return the value of a JSON document in UTF-8.

    Args:
        data: the document.
        where: its origin, for the message.
        limit: the size limit of documents of its kind, in bytes.

    Raises:
        DamagedStoreError: if it is not JSON, repeats a key, nests deeper than `MAX_DEPTH`, has more containers than
            `limit / BYTES_PER_CONTAINER`, holds an integer of more than `MAX_DIGITS` digits or a float of more than
            `MAX_FLOAT_CHARACTERS`, or does not fit into memory.
    """
    try:
        text = data.decode("utf-8")
        _check_depth(text, limit // BYTES_PER_CONTAINER)
        # Python calls the hooks once per number, so they are left out where no number can be too long.
        hooks: dict[str, Any] = {"parse_int": _integer, "parse_float": _float} if _LONG_NUMBER.search(text) else {}
        return json.loads(text, object_pairs_hook=unique_keys, **hooks)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "it does not fit into memory" if isinstance(error, MemoryError) else str(error)
        raise DamagedStoreError(f"{where} is not readable: {reason}") from None


def _check_depth(text: str, most: int) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = count = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        character = match[0][0]
        if character in "[{":
            depth, count = depth + 1, count + 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            if count > most:
                raise ValueError(f"more than {most:,} arrays and objects")
        elif character in "]}":
            depth -= 1


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object in which no key occurs twice, for `object_pairs_hook`: Python's parser would keep the last one.

    Raises:
        ValueError: naming the key.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shortened(repeated)} is repeated")
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits; at most {MAX_DIGITS} are read")
    return int(text)


def _float(text: str) -> float:
    if len(text) > MAX_FLOAT_CHARACTERS:
        raise ValueError(f"a number of {len(text)} characters; at most {MAX_FLOAT_CHARACTERS} are read")
    return float(text)


def shortened(value: Any, limit: int = 80) -> str:
    """Return `repr` of a value for a one-line message, cut to `limit` characters."""
    # A slice first: the text may have millions of characters, of which `repr` would make four each.
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
