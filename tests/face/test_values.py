"""Values as messages show them, and as numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from edgemoe.errors import RequestError
from edgemoe.values import MAX_SHOWN, check_text, number, shown, whole_number


class Silent:
    def __repr__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, "5"),
        (-1.5, "-1.5"),
        ("a", "'a'"),
        (10**39, "1" + "0" * 39),
        (10**400, "an integer of 401 digits"),
        (-(10**5000), "an integer of 5001 digits"),
        ([10**400], "[an integer of 401 digits]"),
        (b"x" * 10**7, "b'xxxxxxxxxxxxxxxxxxxx'..."),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, ...]"),
        ("\ud800", "'\\ud800'"),
        (np.zeros((2, 2)), "array([[0., 0.], [0., 0.]])"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_shown_in_one_short_line(value: Any, expected: str) -> None:
    assert shown(value) == expected


@pytest.mark.parametrize("value", ["x" * 10**7, {"a" * 99: "b" * 99}, Silent(), [[[[[[[[1]]]]]]]], {1, "a"}], ids=type)
def test_any_value_can_be_shown(value: Any) -> None:
    assert 0 < len(shown(value)) <= MAX_SHOWN


def test_a_value_in_itself_can_be_shown() -> None:
    value: list[Any] = []
    value.append(value)
    assert shown(value).startswith("[[")


@pytest.mark.parametrize(
    ("value", "whole", "decimal"),
    [
        (5, 5, 5.0),
        (5.0, 5, 5.0),
        (5.5, None, 5.5),
        (True, None, None),
        (np.True_, None, None),
        ("5", None, None),
        (None, None, None),
        (np.int8(5), 5, 5.0),
        (np.float32(0.5), None, 0.5),
        (Fraction(1, 2), None, 0.5),
        (float("nan"), None, None),
        (float("inf"), None, None),
        (10**400, 10**400, None),
    ],
    ids=lambda value: repr(value)[:10],
)
def test_numbers(value: Any, whole: int | None, decimal: float | None) -> None:
    assert whole_number(value) == whole
    assert number(value) == decimal


def test_a_text_is_unicode() -> None:
    check_text("a\U0001f600", "the prompt")
    with pytest.raises(RequestError, match="^the prompt has half of a character .* at index 2: give whole characters"):
        check_text("ab\udc00", "the prompt")
