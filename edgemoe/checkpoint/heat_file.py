"""The heat of experts, kept between runs so that the next run starts with the hot ones."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgemoe.cache.record import ExpertId
from edgemoe.checkpoint.foreign.foreign_json import parse_json
from edgemoe.checkpoint.state_folder import StateFolder

NAME = "heat.json"
FORMAT = "edgemoe heat"
VERSION = 1
MAX_NBYTES = 16 << 20
"""Upper bound of a file's size; a larger one is ignored. The heat of the largest models takes 1 MB."""


def read(state: StateFolder, experts: Sequence[int]) -> dict[ExpertId, float]:
    """The stored heat by expert; empty without a valid file for this model.

    `experts[layer]` is the number of experts of each layer. The file may have been written with or without the layers
    of a draft head, which come last.
    """
    data = state.read(NAME, MAX_NBYTES)
    if data is None:
        return {}
    try:
        kept = parse_json(data, finite=True)
    except ValueError:
        return {}
    header = {"format": FORMAT, "version": VERSION}
    if not isinstance(kept, dict) or {key: kept.get(key) for key in header} != header:
        return {}
    own, entries = kept.get("experts"), kept.get("heat")
    if not isinstance(own, list) or not all(type(count) is int for count in own) or not isinstance(entries, list):
        return {}
    both = min(len(own), len(experts))
    if own[:both] != list(experts[:both]) or not all(_is_entry(entry, own) for entry in entries):
        return {}
    return {ExpertId(layer, number): heat for layer, number, heat in entries if layer < both}


def write(state: StateFolder, experts: Sequence[int], heat: Mapping[ExpertId, float]) -> None:
    """Stores `heat` unless it is empty. Never fails: a file that cannot be written leaves the earlier one as it is."""
    entries = [[*expert, float(f"{value:.6g}")] for expert, value in sorted(heat.items()) if math.isfinite(value)]
    if not entries:
        return
    kept = {"format": FORMAT, "version": VERSION, "experts": list(experts), "heat": entries}
    # ValueError: a path that no system accepts.
    with contextlib.suppress(OSError, ValueError):
        state.write(NAME, json.dumps(kept, separators=(",", ":")).encode())


def _is_entry(entry: Any, experts: Sequence[int]) -> bool:
    """Whether `entry` is [layer, expert, heat]: an expert of the model, and a finite number."""
    match entry:
        case [int(layer), int(number), float(heat)]:
            return 0 <= layer < len(experts) and 0 <= number < experts[layer] and math.isfinite(heat)
    return False
