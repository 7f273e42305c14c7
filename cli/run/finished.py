"""What an earlier run left in a file of results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgemoe.cli.exits import FileTrouble, why
from edgemoe.cli.run.ledger import Ledger
from edgemoe.cli.run.records import RECORD_START
from edgemoe.server.protocols.fields import FieldError, words
from edgemoe.sizes import format_bytes

MAX_RECORD = 1 << 30
"""Bytes of a line of results that is read: 128 replies of 8,192 tokens with log-probabilities have about as many."""


@dataclass(frozen=True)
class Finished:
    """The results there are, the bytes they take, and the bytes of half a line after them."""

    count: int = 0
    nbytes: int = 0
    torn_nbytes: int = 0


def read_finished(path: str, ledger: Ledger) -> Finished:
    """Note every result of a file in `ledger`, holding one at a time. Raises FileTrouble for what no run has written.

    Only the last line may be unfinished, and only as the beginning of a result, so that nothing else is ever cut off.
    """
    count = nbytes = 0
    torn = b""
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(iter(partial(file.readline, MAX_RECORD), b""), 1):
                if len(raw) == MAX_RECORD:
                    raise FileTrouble(
                        f"{path} cannot be resumed: its line {number} has {format_bytes(MAX_RECORD)} or more, "
                        "which no result has; give another file with -o"
                    )
                if torn:
                    raise FileTrouble(f"{path} cannot be resumed: its line {number - 1} is not JSON; mend or remove it")
                record = _record(raw)
                if record is None:
                    torn = raw
                    continue
                _note(record, number, path, ledger)
                count += 1
                nbytes += len(raw)
    except OSError as error:
        raise FileTrouble(f"cannot read {path}: {why(error)}") from error
    if not _is_begun_record(torn):
        raise FileTrouble(f"{path} cannot be resumed: its last line is no result; give another file with -o")
    return Finished(count, nbytes, len(torn))


def _record(raw: bytes) -> Any:
    """A line's JSON; None for what is none, or has no end of line, which is the last thing that is written."""
    try:
        return json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def _is_begun_record(line: bytes) -> bool:
    """Whether a line can be the beginning of a record, or the zeros that a loss of power leaves in its place."""
    begin = line[: len(RECORD_START)]
    return RECORD_START.startswith(begin) or not line.strip(b"\0\n")


def _note(record: Any, number: int, path: str, ledger: Ledger) -> None:
    try:
        if not isinstance(record, dict):
            raise FieldError("it is no object")
        custom_id, record_id = (words(name, record.get(name)) for name in ("custom_id", "id"))
    except FieldError as error:
        raise FileTrouble(
            f"{path} cannot be resumed: its line {number} is no result: {error}; give another file with -o"
        ) from error
    if not ledger.add_result(custom_id, record_id, number):
        raise FileTrouble(f"{path} cannot be resumed: its line {number} is a second result of {custom_id!r}; remove it")
