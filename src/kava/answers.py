"""The number that a text ends in, by GSM8K's convention: what follows `####`, or else the last number there is.

Cobbe et al. 2021, https://arxiv.org/abs/2110.14168. Numbers are compared by value, exactly: `1,234`, `$1234.00` and
`2468/2` are one and the same.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

MARK: Final = "####"
_MINUS: Final = "-\N{MINUS SIGN}"
_WHOLE: Final = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)"
_NUMBER: Final = re.compile(
    # A minus directly after a word, a number or a bracket is a dash or a subtraction, no sign.
    rf"(?P<sign>(?<![\w.)\]%])[{_MINUS}])?(?:[$€£](?P<inner>[{_MINUS}])?)?"
    rf"(?:(?P<mixed>{_WHOLE})\s+(?=\d+/\d))?"
    rf"(?:(?<!/)(?P<over>{_WHOLE})/(?P<under>0*[1-9]\d*)(?![\d/])|(?P<whole>{_WHOLE})?(?P<part>\.\d+)|(?P<plain>{_WHOLE}))"
)


def final_number(text: str, *, first_mark: bool = False) -> Fraction | None:
    """The number that a text ends in; None if there is none.

    After the last `####` the first number counts, and without a mark the last one of the text. Thousands separators,
    currency signs, units and a full stop are no part of it; `3/4` and `1 1/2` are fractions, `50%` is 50.

    Args:
        text: an answer, or what a model wrote.
        first_mark: go by the first `####`: a model that does not stop goes on to questions of its own.
    """
    _, mark, after = text.partition(MARK) if first_mark else text.rpartition(MARK)
    if not mark:
        found = list(_NUMBER.finditer(text))
        return _value(found[-1]) if found else None
    match = _NUMBER.search(after)
    return _value(match) if match else None


def same_number(written: str, answer: str, *, first_mark: bool = False) -> bool:
    """Whether both texts end in the same number, and in a number at all; see `final_number`."""
    found = final_number(written, first_mark=first_mark)
    return found is not None and found == final_number(answer)


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that was found; None if it has more digits than Python reads, as of a model that repeats itself."""

    def number(name: str) -> Fraction:
        return Fraction((match[name] or "0").replace(",", ""))

    try:
        if match["over"]:
            size = number("mixed") + number("over") / number("under")
        else:
            size = number("whole") + number("part") + number("plain")
    except ValueError:
        return None
    return -size if match["sign"] or match["inner"] else size
