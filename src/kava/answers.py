r"""The number that a text ends in: what follows `####`, what is in `\boxed{}`, or else the last number.

`####` is GSM8K's mark (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168), `\boxed{}` that of MATH and of models
trained on it. Numbers are compared by value, exactly: `1,234`, `1{,}234`, `$1234.00` and `2468/2` are equal.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Final

MARK: Final = "####"
_DIGITS: Final = 4000
"""Longest number that is read, in digits; models that repeat themselves write longer ones."""
_MINUS: Final = "-\N{MINUS SIGN}\N{EN DASH}\N{FULLWIDTH HYPHEN-MINUS}"
_CURRENCY: Final = "$€£¥₹₩"
_WHOLE: Final = (
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,]*\d)"  # Indian grouping: 1,23,456.
    r"|\d+)"
)
_UNDER: Final = r"(?:\d+\.\d+|\d+)"
_NUMBER: Final = re.compile(
    # A minus directly after a word, a number or a bracket is a dash or a subtraction, no sign.
    rf"(?P<sign>(?<![\w.)\]}}%])[{_MINUS}])?(?:[{_CURRENCY}](?P<inner>[{_MINUS}])?)?"
    rf"(?:(?P<mixed>{_WHOLE})\s+(?=\d+/\d))?"
    rf"(?:(?<!/)(?P<over>{_WHOLE}(?:\.\d+)?)\s?/\s?(?=[\d.]*[1-9])(?P<under>{_UNDER})(?![\d/])"
    rf"|(?:(?P<whole>{_WHOLE})?(?P<part>(?<![A-Za-z])\.\d+)|(?P<plain>{_WHOLE}))(?:[eE](?P<power>[+-]?\d+)(?!\w))?)"
)
_BOX: Final = re.compile(r"\\f?boxed\s*")
_GROUPED: Final = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,]|\.\d)")
_SUM: Final = re.compile(rf"[^\S\n]*(?:<<)?[\d.,()%+*/×·x{_CURRENCY}{_MINUS} \t]*\d[^\n=\w]*=(?!=)(?=[^\n]*\d)")
"""A calculation before its result, as in `5 * 3 = 15` and GSM8K's `<<5*3=15>>15`."""
_ROOT: Final = re.compile(r"(?:\\sqrt\s*(?:\[\d+\])?\s*\{?|√)\s*$")
_IRRATIONAL: Final = re.compile(r"\s*(?:\\sqrt|√|\\pi\b|π)")

_SPACES: Final = r"\\[,!;:> ]|~|[\u00a0\u2007\u2009\u202f]|['\N{RIGHT SINGLE QUOTATION MARK}_]"
_EXPONENT: Final = rf"\s*(?:\^|\*\*)\s*(?:\{{\s*([+{_MINUS}]?\d+)\s*\}}|([+{_MINUS}]?\d+))"
_WRAPPED: Final = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname|boldsymbol|emph|underline)\s*"
    r"\{([^{}]*)\}"
)
_FRACTION: Final = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")


def final_number(text: str, *, first_mark: bool = False) -> Fraction | None:
    r"""Return the number that a text ends in; None if there is none.

    After the last `####`, or else in the last `\boxed{}`, the first number counts, or the result of a calculation that
    stands there, and without either the last number of the text. Thousands separators, currency signs, units and a
    full stop are no part of it; `3/4`, `\frac{3}{4}` and `1 1/2` are fractions, `50%` is 50, `1.5 \times 10^6` and
    `2^{10}` are what they amount to. A multiple of a root or of pi is None.

    Args:
        text: an answer, or what a model wrote.
        first_mark: use the first mark: a model that does not stop continues with questions of its own.
    """
    _, mark, after = text.partition(MARK) if first_mark else text.rpartition(MARK)
    boxes = [] if mark else list(_BOX.finditer(text))
    if not mark and not boxes:
        plain = _plain(text)
        matches = list(_NUMBER.finditer(plain))
        return _value(plain, matches[-1]) if matches else None
    if boxes:
        after = _argument(text[boxes[0 if first_mark else -1].end() :])
        after = re.split(r"=|≈|\\approx", after)[-1]
    while calculation := _SUM.match(after):
        after = after[calculation.end() :]
    plain = _GROUPED.sub(lambda match: match[0].replace(" ", ","), _plain(after))
    first = _NUMBER.search(plain)
    return _value(plain, first) if first else None


def same_number(written: str, answer: str, *, first_mark: bool = False) -> bool:
    """Return whether both texts end in the same number, and in a number at all; see `final_number`."""
    number = final_number(written, first_mark=first_mark)
    return number is not None and number == final_number(answer)


def _argument(text: str) -> str:
    """The group in braces that `text` begins with, or its first word."""
    if not text.startswith("{"):
        return text.split(maxsplit=1)[0] if text.strip() else ""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:place]
    return text[1:].partition("\n")[0]


def _plain(text: str) -> str:
    """The text with the LaTeX and the Unicode around numbers spelt in ASCII."""
    text = "".join(_spelt(c) if c > "\x7f" else c for c in text)
    # In LaTeX, {,} is a comma without space: between thousands, or before decimals.
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<=\d)\{[,.]\}(?=\d)", ".", text)
    text = re.sub(rf"(?<=\d)(?:{_SPACES})(?=\d{{3}}(?!\d))", ",", text)
    if "\\" in text:
        text = re.sub(r"\\([$%#&_])", r"\1", text)
        text = re.sub(r"\\!|\\(?:left|right|displaystyle)(?![A-Za-z])", "", text)
        text = re.sub(r"\\[,;:> ]|\\q?quad(?![A-Za-z])", " ", text)
        text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", " ", text)
        for pattern, spelt in ((_WRAPPED, r" \1 "), (_FRACTION, _fraction)):
            text = pattern.sub(spelt, text)
    text = re.sub(rf"(?<=\d)\s*(?:\\times|\\cdot|[×·*x])\s*10{_EXPONENT}", _power_of_ten, text)
    text = re.sub(rf"(?<![\w.,/^])10{_EXPONENT}(?![\d.])", lambda match: "1" + _power_of_ten(match), text)
    text = re.sub(rf"(?<![\w.,/^])(\d{{1,9}}){_EXPONENT}(?![\d.])", _power, text)
    # What is left of exponents belongs to units and to variables; a minus behind one is no sign.
    return re.sub(rf"(?<=[A-Za-z)\]}}\s]){_EXPONENT}", "}", text)


def _spelt(character: str) -> str:
    """ASCII for a fraction in one character, a fraction slash, or a digit of another script."""
    if character in "\N{FRACTION SLASH}\N{DIVISION SLASH}":
        return "/"
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        value = Fraction(unicodedata.numeric(character)).limit_denominator(100)
        return f" {value.numerator}/{value.denominator} "
    return character


def _fraction(match: re.Match[str]) -> str:
    over, under = (match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip()
    before = match.string[match.start() - 1 : match.start()]
    space = " " if before.isdigit() else ""
    if re.fullmatch(rf"[{_MINUS}]?[\d.,]+", over) and re.fullmatch(r"[\d.,]+", under):
        return f"{space}{over}/{under} "
    return f"{space}({over})/({under})"


def _power_of_ten(match: re.Match[str]) -> str:
    exponent = match[1] or match[2]
    return "e" + ("-" if exponent[0] in _MINUS else "") + exponent.lstrip("+" + _MINUS)


def _power(match: re.Match[str]) -> str:
    base, exponent = int(match[1]), match[2] or match[3]
    if exponent[0] in _MINUS or len(exponent) > 5 or len(match[1]) * int(exponent) > _DIGITS:
        return "?"
    return str(base ** int(exponent))


def _value(text: str, match: re.Match[str]) -> Fraction | None:
    """The number of a match; None if it is a multiple of an irrational one, or has too many digits."""
    if _ROOT.search(text, 0, match.start()) or _IRRATIONAL.match(text, match.end()):
        return None
    power = match["power"] or "0"
    if len(match[0]) > _DIGITS or len(power) > 5 or abs(int(power)) > _DIGITS:
        return None

    def number(name: str) -> Fraction:
        return Fraction((match[name] or "0").replace(",", ""))

    if match["over"]:
        size = number("mixed") + number("over") / number("under")
    else:
        size = (number("whole") + number("part") + number("plain")) * Fraction(10) ** int(power)
    return -size if match["sign"] or match["inner"] else size
