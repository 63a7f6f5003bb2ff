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


def file_name_fault(error: UnicodeEncodeError) -> str | None:
    """Describe a file name that the locale cannot encode; None if the error is another one."""
    encoding = sys.getfilesystemencoding()
    if codecs.lookup(encoding).name == "utf-8" or codecs.lookup(error.encoding) != codecs.lookup(encoding):
        return None
    name = error.object if len(error.object) < 200 else error.object[error.start : error.end]
    return (
        f"{name!r}: the locale's encoding, {encoding}, has no such file name. Set PYTHONUTF8=1, or a locale such as "
        "LC_ALL=C.UTF-8"
    )


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = (units[at : at + 2].hex() for at in range(0, len(units), 2))
    return "".join(f"\\u{pair}" for pair in pairs), error.end


codecs.register_error(_ESCAPE, _escaped)
