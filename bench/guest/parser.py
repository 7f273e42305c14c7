"""What reads input of others: its samples, how it is called, and what it may raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Parser:
    """One reader of foreign input, for the fuzzer."""

    name: str
    samples: Callable[[Path], list[bytes]]
    """Valid inputs to mutate, made in an empty folder."""
    parse: Callable[[bytes, Path], object]
    """Reads one input; the folder is for files, and kept between the calls."""
    errors: tuple[type[Exception], ...]
    """What it may raise: anything else is a fault."""
    share: float = 1.0
    """Cases of this parser in relation to the others': slow ones have fewer."""
    sound: bool = True
    """Whether none of the samples may be refused."""
    text: bool = True
    """Whether its inputs are texts, such as JSON, whose values are changed as well as their bytes."""
