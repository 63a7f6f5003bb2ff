"""The number that an answer ends in: what people and models write, one row each."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava.answers import final_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50 dollars, not 9", "2469135/2"),
        ("The answer is 42.", "42"),
        ("It costs $5.00", "5"),
        ("It costs $5.00.", "5"),
        ("#### -3", "-3"),
        ("#### -$4", "-4"),
        ("#### $-4", "-4"),
        ("first #### 3 then #### -$4", "-4"),
        ("#### \N{MINUS SIGN}7", "-7"),
        ("10-4", "4"),
        ("(2+3)-4", "4"),
        ("10 -4", "-4"),
        ("from 5 to -6 degrees", "-6"),
        ("#### 3/4", "3/4"),
        ("#### -3/4", "-3/4"),
        ("#### 1 1/2 cups", "3/2"),
        ("he has 48/2 = 24", "24"),
        ("half is .5", "1/2"),
        ("#### 0.5", "1/2"),
        ("1/0", "0"),
        ("on 12/25/2020", "2020"),
        ("It costs $1,000, of which 20%", "20"),
        ("the numbers 3,4", "4"),
        ("version 1.2.3", "3/10"),
        ("#### 72\nQuestion: how many? 5", "72"),
        ("#### x = 8", "8"),
        ("none at all", None),
        ("#### none", None),
        ("7 then ####", None),
        ("", None),
        pytest.param("#### " + 5000 * "7", None, id="endless"),
        pytest.param("#### 0." + 5000 * "7", None, id="endless fraction"),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(number))


def test_a_model_that_goes_on_is_held_to_its_first_answer() -> None:
    written = "She has 5.\n#### 5\nTom has 7.\n#### 7"
    assert final_number(written) == 7
    assert final_number(written, first_mark=True) == 5
    assert same_number(written, "#### 5", first_mark=True)
    assert not same_number(written, "#### 5")


@pytest.mark.parametrize(
    ("written", "answer", "same"),
    [
        ("it is 1,200.0", "#### 1200", True),
        ("it is 1,200.5", "#### 1200", False),
        ("#### 0.75", "#### 3/4", True),
        ("no idea", "#### 1200", False),
        ("no idea", "nor I", False),
        ("12", "", False),
    ],
)
def test_numbers_match_by_value(written: str, answer: str, same: bool) -> None:
    assert same_number(written, answer) is same


@given(st.integers(-(10**12), 10**12), st.integers(0, 2))
def test_any_number_is_read_as_it_is_written(number: int, places: int) -> None:
    written = f"{Decimal(number).scaleb(-places):,f}"
    assert final_number(f"He has 3 and then\n#### {written} apples.") == Fraction(number, 10**places)
