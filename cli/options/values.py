"""What the values of options may be: readers that refuse all else with what is right."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import Any

from edgemoe.cli.options.parser import cut
from edgemoe.cli.options.suggestions import did_you_mean
from edgemoe.sizes import parse_bytes

_SHARE = re.compile(r"\d+(\.\d+)?%")
MAX_WHOLE = (1 << 63) - 1
"""Largest whole number that an option takes."""
_MAX_DIGITS = 400
_MAX_SIZE = 40
"""Characters of a size or a share."""
_MAX_THREADS = 1024
_MIN_SPEED, _MAX_SPEED = 1e-6, 1e6
"""Gigabytes a second of a link that can be simulated."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def text(value: str) -> str:
    """Any text."""
    return value


def words(value: str) -> str:
    """A text for the model. A path may have any bytes, a text may not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8 text") from None
    return value


def whole(value: str) -> int:
    """A whole number of 64 bits; narrower limits are the library's."""
    # Python reads numbers of at most 4300 digits, and says so in words that are not for people.
    try:
        number = int(value) if len(value) <= _MAX_DIGITS else _digits(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{cut(value)!r} is not a whole number") from None
    if abs(number) > MAX_WHOLE:
        raise argparse.ArgumentTypeError(f"{cut(value)} is too large; give {MAX_WHOLE} at most")
    return number


def _digits(value: str) -> int:
    """A number beyond every limit where `value` is one; ValueError else."""
    sign, digits = (-1, value[1:]) if value[:1] == "-" else (1, value)
    if not digits.strip().isdecimal():
        raise ValueError
    return sign * (MAX_WHOLE + 1)


def counted(value: str) -> int:
    """A whole number, 1 or more."""
    number = whole(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1; give 1 or more")
    return number


def port(value: str) -> int:
    """A TCP port; 0 is any."""
    number = whole(value)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port; give one from 0 to 65535")
    return number


def decimal(value: str) -> float:
    """A finite number; narrower limits are the library's."""
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{cut(value)!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{cut(value)!r} must be a finite number")
    return number


def json_object(value: str) -> dict[str, Any]:
    """An object in JSON."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{cut(value)!r} is no JSON object such as {{"enable_thinking": false}}')
    return found


def speed(value: str) -> float:
    """A number above 0."""
    try:
        number = decimal(value)
    except argparse.ArgumentTypeError:
        number = 0.0
    if number <= 0:
        raise argparse.ArgumentTypeError(
            f"{cut(value)} is not above 0; give a speed in gigabytes a second, such as 12.5"
        )
    if not _MIN_SPEED <= number <= _MAX_SPEED:
        raise argparse.ArgumentTypeError(
            f"{cut(value)} is no speed of a link; give {_MIN_SPEED:g} to {_MAX_SPEED:g} gigabytes a second"
        )
    return number


def thread_count(value: str) -> int:
    """A number of threads."""
    number = counted(value)
    if number > _MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{number} threads are too many; give {_MAX_THREADS} at most")
    return number


def budget(value: str) -> str:
    """An expert budget, as text; what it may be at most is the library's to say."""
    size = value.strip().lower()
    try:
        if size != "off" and not size.isdecimal() and not _SHARE.fullmatch(size):
            parse_bytes(size)
        if len(size) > _MAX_SIZE:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{cut(value)!r} is not a budget; give off, experts of a layer such as 8, a share of the routing such as "
            "95%, or bytes such as 64MiB"
        ) from None
    return value


def one_of(*names: str) -> Callable[[str], str]:
    """One of a few words."""

    def named(value: str) -> str:
        if value not in names:
            meant = did_you_mean(value, names)
            raise argparse.ArgumentTypeError(f"{cut(value)!r} is not known; give one of {', '.join(names)}{meant}")
        return value

    return named


def batch_size(value: str) -> str | int:
    """How many sequences to decode together: a number, or auto."""
    size = value.strip().lower()
    if size != "auto" and not size.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{cut(value)!r} is no size of a batch; give auto, or a number such as 16")
    return size if size == "auto" else counted(size)


def device(value: str) -> str:
    """Where to compute."""
    if not _DEVICE.fullmatch(value):
        raise argparse.ArgumentTypeError(f"{cut(value)!r} is not known; give one of auto, cpu, cuda, cuda:N")
    return value


def expert_cache(value: str) -> str | int:
    """The size of the expert cache as the library takes it: a number of slots as an int, all else as text."""
    size = value.strip()
    if size.isdecimal():
        return whole(size)
    if size.lower() == "auto" or (_SHARE.fullmatch(size) and len(size) <= _MAX_SIZE):
        return size
    try:
        parse_bytes(size)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{cut(value)!r} is not a size; give auto, bytes such as 6GiB, a share of the experts such as 40%, "
            "or a number of slots such as 96"
        ) from None
    return size


def cpu_share(value: str) -> str:
    """A share of the missing experts."""
    share = value.strip().lower()
    if share not in ("auto", "off"):
        try:
            number = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
            if not 0 <= number <= 1:
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{cut(value)!r} is not a share; give auto, off, or a share of the missing experts such as 35% or 0.35"
            ) from None
    return share
