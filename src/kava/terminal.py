r"""Printing on terminals and into files of any encoding.

A stream that cannot encode a character would end the command with a traceback. Here such a character is printed as an
escape instead, `\u2423`: the form that JSON reads, so that output for programs stays valid.
"""

from __future__ import annotations

import codecs
import io
import sys
from typing import Final

_ESCAPE: Final = "kava.escape"


def escape_unprintable() -> None:
    """Make both output streams print characters that they cannot encode as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPE)


def printable(text: str) -> str:
    """Return the text as standard output prints it, for layouts that count its characters."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, _ESCAPE).decode(encoding)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = (units[at : at + 2].hex() for at in range(0, len(units), 2))
    return "".join(f"\\u{pair}" for pair in pairs), error.end


codecs.register_error(_ESCAPE, _escaped)
