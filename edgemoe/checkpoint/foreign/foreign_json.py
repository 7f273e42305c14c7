"""Reads JSON that others wrote, with limits on its size, its depth and its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemoe.checkpoint.foreign.foreign_file import read_file
from edgemoe.errors import CheckpointError
from edgemoe.values import shown

MAX_CONFIG = 16 << 20
"""Bytes of a configuration: those of the largest published ones, with a table for each layer, have 1 MB."""
MAX_INDEX = 256 << 20
"""Bytes of an index: that of 100,000 tensors has 10 MB."""
MAX_DEPTH = 64
"""Levels of nesting. What reads a configuration calls itself for each of them."""
MAX_DIGITS = 40
"""Digits of an integer. The largest field has 20; a few more let a message tell which field is out of its range."""


def parse_json(data: bytes, *, unique: bool = False, depth: int | None = MAX_DEPTH, finite: bool = False) -> Any:
    """The value of the JSON text `data`.

    Raises ValueError, with the reason, for what is no JSON in UTF-8, for more than `depth` levels (None: as many as
    Python reads), and for integers of many digits; with `unique` for a name that an object has twice; with `finite` for
    NaN and infinities, which are no JSON but which Python writes.
    """
    hooks: dict[str, Any] = {"parse_int": _integer}
    if unique:
        hooks["object_pairs_hook"] = _without_duplicates
    if finite:
        hooks["parse_constant"] = _refuse_constant
    try:
        found = json.loads(data.decode("utf-8"), **hooks)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
    if depth is not None and is_deeper(found, depth):
        raise ValueError(f"its values are nested deeper than {depth} levels")
    return found


def read_json(path: Path, limit: int = MAX_CONFIG, *, unique: bool = False) -> Any:
    """The value of the JSON file `path`, of `limit` bytes at most.

    Raises CheckpointError, with the file and the reason, for what `read_file` and `parse_json` refuse.
    """
    data = read_file(path, limit)
    try:
        return parse_json(data, unique=unique)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch the checkpoint again") from error


def read_object(path: Path, limit: int = MAX_CONFIG, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises CheckpointError as `read_json`, and for any other value."""
    found = read_json(path, limit, unique=unique)
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} cannot be read (it is {shown(found)}, and no object): fetch the checkpoint again"
        )
    return found


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested in `value` more than `depth` levels deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                inner.extend(part for part in each.values() if isinstance(part, (dict, list)))
            elif isinstance(each, list):
                inner.extend(part for part in each if isinstance(part, (dict, list)))
        level = inner
    return bool(level)


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the integer {text[:12]}… has {len(text)} digits")
    return int(text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {shown(twice)} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
