"""Values that callers give: read as numbers, checked as texts, and shown in messages. Needs no torch."""

from __future__ import annotations

import math
import reprlib
from numbers import Integral, Real
from typing import Any

from edgemoe.errors import EdgeMoEError, RequestError

MAX_SHOWN = 80
"""Characters of a value in a message."""
MAX_DIGITS = 40
"""Digits of an integer that is shown whole."""


class _Shortened(reprlib.Repr):
    """Looks at the beginnings of long values only: they may be very long, and integers too long for `repr`."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, value: int, level: int) -> str:
        """Every digit of a short integer, the number of digits of a long one."""
        digits = int(value.bit_length() * math.log10(2)) + 1
        return repr(value) if digits <= MAX_DIGITS else f"an integer of {digits} digits"

    def repr_bytes(self, value: bytes, level: int) -> str:
        """The first ones."""
        return repr(bytes(value[:20])) + ("..." if len(value) > 20 else "")

    repr_bytearray = repr_bytes


def shown(value: Any) -> str:
    """`value` as a message shows it: its `repr`, shortened, in one line. Never fails, whatever the value."""
    text = " ".join(_Shortened().repr(value).split()).encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def whole_number(value: Any) -> int | None:
    """`value` as an int, where it is a whole number, of numpy too; None where it is none, as True and False are."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    read = number(value)
    return int(read) if read is not None and read.is_integer() else None


def number(value: Any) -> float | None:
    """`value` as a float, where it is a number, of numpy too; None where it is none, infinite or beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        read = float(value)
    except OverflowError:
        return None
    return read if math.isfinite(read) else None


def check_text(text: str, what: str) -> None:
    """Raises RequestError, which begins with `what`, for a text that is not Unicode: one with half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} has half of a character (a lone surrogate) at index {error.start}: give whole characters, "
            "as str.encode(errors='replace').decode() makes them"
        ) from None


def check_callable(value: Any, name: str) -> None:
    """Raises EdgeMoEError unless `value`, the argument `name`, can be called, or is None."""
    if value is not None and not callable(value):
        raise EdgeMoEError(f"{name}={shown(value)} cannot be called: give a function, or None")
