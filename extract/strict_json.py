"""JSON records from a stream: every fault is one line, and memory holds one record at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, cast

from ..errors import CorpusError
from ..store.safe_json import unique_keys

_BLOCK: Final = 1 << 20
_SPACE: Final = " \t\r\n"
_DECODER: Final = json.JSONDecoder(object_pairs_hook=unique_keys)


def json_lines(stream: BinaryIO, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON-lines stream, one a line, with their place; empty lines are skipped.

    Raises:
        CorpusError: naming the line.
    """
    for number, line in enumerate(stream, 1):
        data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not data.strip():
            continue
        where = f"{label} line {number}"
        try:
            row = _DECODER.decode(data.decode())
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where}: not a JSON object: {error}. Save the file as UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not a JSON object: {_reason(error)}. Repair or remove the line.") from None
        yield where, _object(row, where)


def json_records(stream: BinaryIO, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON list, or objects that follow each other, with their place.

    Raises:
        CorpusError: naming the record.
    """
    text, position, number, ended, listed = "", 0, 0, False, False
    decode = _utf8_blocks(stream, label)
    while True:
        position = _after_space(text, position)
        if position == len(text) and not ended:
            block = next(decode, None)
            text, position, ended = (block or ""), 0, block is None
            continue
        if position == len(text):
            if listed:
                raise CorpusError(f"{label}: the list of records does not end; the file is cut off. Restore it.")
            return
        if number == 0 and not listed and text[position] == "[":
            listed, position = True, position + 1
            continue
        if listed and text[position] == "]":
            if (rest := text[position + 1 :].strip() or "".join(decode).strip())[:1]:
                raise CorpusError(f"{label}: more text follows the list of records: {rest[:20]!a}. Remove it.")
            return
        if listed and number and text[position] == ",":
            position += 1
            continue
        where = f"{label} record {number + 1}"
        try:
            row, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
            if cut and not ended:  # The record may end in the next block; each try reads twice as much.
                more = [
                    block for _, block in zip(range(max(1, (len(text) - position) // _BLOCK)), decode, strict=False)
                ]
                text, position, ended = text[position:] + "".join(more), 0, not more
                continue
            raise CorpusError(f"{where}: not JSON: {_reason(error)}. Repair the file.") from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not JSON: {_reason(error)}. Repair or remove the record.") from None
        number += 1
        yield where, _object(row, where)


def _utf8_blocks(stream: BinaryIO, label: str) -> Iterator[str]:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        while block := stream.read(_BLOCK):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{label}: not UTF-8: {error}. Save the file as UTF-8.") from None


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: not a JSON object but {type(row).__name__}. Give one object for each record.")
    return cast("dict[str, Any]", row)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "integer string conversion" in str(error):
        return "it holds a number of more than 4,300 digits"
    return str(error)
