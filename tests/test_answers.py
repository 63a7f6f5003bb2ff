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
        # LaTeX, as models write it.
        (r"\boxed{8{,}000}", "8000"),
        (r"so it is $\boxed{1{,}234{,}567}$.", "1234567"),
        (r"\boxed{3{,}14}", "3.14"),
        (r"It is 8\,000.", "8000"),
        (r"8\;000 and 8\ 000", "8000"),
        (r"1\,234\,567 people", "1234567"),
        (r"5\,\text{cm}", "5"),
        (r"\frac{3}{4}", "3/4"),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
        (r"\boxed{\dfrac{-3}{4}}", "-3/4"),
        (r"\tfrac34", "3/4"),
        (r"\frac{1{,}000}{3}", "1000/3"),
        (r"\boxed{1\frac{1}{2}}", "3/2"),
        (r"-1 \frac{1}{2}", "-3/2"),
        (r"\boxed{\$5.00}", "5"),
        (r"\boxed{-\$5}", "-5"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{5 \text{ dollars}}", "5"),
        (r"\boxed{\text{5 dollars}}", "5"),
        (r"\boxed{\mathbf{-5}}", "-5"),
        (r"\boxed{25 \text{ cm}^2}", "25"),
        (r"the area is 25 cm^2", "25"),
        (r"the area is 25\,\mathrm{m}^{2}", "25"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{x = 12}", "12"),
        (r"\boxed{3 \times 4 = 12}", "12"),
        (r"\boxed{\left( 7 \right)}", "7"),
        (r"$\boxed{7}$, so 3 are left of 10", "7"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{5} #### 6", "6"),
        (r"#### \boxed{8{,}000}", "8000"),
        (r"\boxed 7 of 9", "7"),
        (r"\fbox{7} of 9", "9"),
        (r"\fboxed{7} of 9", "7"),
        (r"\boxed{7", "7"),
        (r"\boxed{\text{none}} of 9", None),
        (r"\boxed{}", None),
        (r"\boxed{2\sqrt{3}}", None),
        (r"\boxed{\frac{\sqrt{3}}{2}}", None),
        (r"\boxed{\frac{22}{7}\pi}", None),
        ("it is 5π", None),
        # Thousands.
        ("1,23,456", "123456"),
        ("₹1,00,00,000", "10000000"),
        ("12,34,567.50 rupees", "2469135/2"),
        ("the numbers 1,23", "23"),
        ("the numbers 3,45,6", "6"),
        ("#### 1 234 567", "1234567"),
        (r"\boxed{12 345}", "12345"),
        ("of 12 345 are left", "345"),
        ("1\u00a0234\u202f567 people", "1234567"),
        ("1'234'567 Franken", "1234567"),
        ("1_000_000", "1000000"),
        ("2020\u00a0300", "300"),
        # Signs and scripts.
        ("\N{MINUS SIGN}5", "-5"),
        ("it is \N{EN DASH}5", "-5"),
        ("pages 3\N{EN DASH}5", "5"),
        (r"x^{2}-5", "5"),
        ("-₹5", "-5"),
        ("１２", "12"),
        ("½", "1/2"),
        ("1½ cups", "3/2"),
        ("3\N{FRACTION SLASH}4", "3/4"),
        ("Rs.500", "500"),
        # Powers.
        ("1.5e6", "1500000"),
        ("2E-3", "1/500"),
        (r"1.5 \times 10^6", "1500000"),
        (r"\boxed{3 \cdot 10^{-2}}", "3/100"),
        ("6.02 × 10^23", "602000000000000000000000"),
        ("10^6", "1000000"),
        ("2^{10}", "1024"),
        ("2**10", "1024"),
        ("**5**", "5"),
        ("1e99999999999", None),
        # Quotients.
        ("1.5/3", "1/2"),
        ("3 / 4 of it", "3/4"),
        (r"\boxed{\frac{0.5}{2}}", "1/4"),
        pytest.param("#### " + 5000 * "7", None, id="endless"),
        pytest.param("1" + 3000 * ",000", None, id="endless thousands"),
        pytest.param(r"\boxed{" + 3000 * r"\frac{1}{", "1", id="endless fractions"),
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
    boxed = r"\boxed{5} Tom has 7. \boxed{7}"
    assert final_number(boxed) == 7
    assert final_number(boxed, first_mark=True) == 5


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
