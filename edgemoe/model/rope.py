"""Rotary embeddings that rescale positions with the length of a pass, which limits what may share a pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def rescaling_lengths(configs: Iterable[Any]) -> list[int]:
    """Lengths in tokens beyond which LongRoPE rescales all positions of a pass, as in Phi-3.5-MoE; ascending."""
    kinds = [kind for config in configs for kind in _rope_kinds(config) if kind.get("rope_type") == "longrope"]
    return sorted({int(kind["original_max_position_embeddings"]) for kind in kinds})


def scales_with_length(config: Any) -> bool:
    """Whether the positions of a pass depend on its longest sequence."""
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in _rope_kinds(config))


def _rope_kinds(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of `config`: one, or one for each kind of attention."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(each for each in rope.values() if isinstance(each, dict))]
