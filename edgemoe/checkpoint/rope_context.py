"""The longest sequence of a model, with the scaling of its rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTED = ("longrope", "su", "llama3", "default", "proportional")
"""Kinds of scaling whose configurations give the scaled length as `max_position_embeddings`."""


def context_limit(config: Any) -> int | None:
    """The longest sequence that `config`, a text configuration, allows, in tokens; None without a limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    # A scaling for each kind of layer goes with a length that is scaled already.
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return limit
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind in COUNTED or not isinstance(factor, (int, float)) or factor <= 1:
        return limit
    # YaRN says what it began with; the other kinds scale what the configuration gives.
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(limit, int((original or limit) * factor))
