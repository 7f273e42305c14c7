"""Texts that a conversation takes from files and from standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

from edgemoe.cli.exits import FileTrouble, why
from edgemoe.sizes import format_bytes

MAX_BYTES = 64 << 20
"""Longest text that is read, since an endless device has no end: far more than any context holds."""


def place_of(path: str) -> Path:
    """A path as it is typed, where `~` stands for a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a user that does not exist
        return Path(path)


def read_text(path: str) -> str:
    """A file's text without the line ends at its end. Raises FileTrouble, also for one longer than `MAX_BYTES`."""
    try:
        with place_of(path).open("rb") as file:
            return _decoded(file, path).rstrip("\r\n")
    except OSError as error:
        raise FileTrouble(f"cannot read {path}: {why(error)}") from error
    except ValueError as error:  # a null byte in the path
        raise FileTrouble(f"cannot read {path}: {error}") from error


def piped_text() -> str:
    """What comes in on standard input, without the line ends around it. Raises FileTrouble."""
    if sys.stdin is None:  # started with its input closed
        return ""
    return _decoded(sys.stdin.buffer, "standard input").strip("\r\n")


def _decoded(file: BinaryIO, name: str) -> str:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise FileTrouble(f"{name} has more than {format_bytes(MAX_BYTES)}, too much for a prompt; give a part of it")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise FileTrouble(f"{name} is not UTF-8 text; convert it, for example with 'iconv -t UTF-8'") from None
