"""Layers of a checkpoint after the last one of its model: heads that predict several tokens (MTP)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgemoe.checkpoint.checkpoint import Checkpoint

LAYER = re.compile(r"^(.*\blayers\.)(\d+)\.(.+)$")
DECLARED = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
"""The names under which configurations give the number of such layers."""


def without_heads_that_draft(checkpoint: Checkpoint, config: Any) -> Checkpoint:
    """`checkpoint` without the layers after the last one of `config`, a text configuration, where they are such heads.

    They are where the configuration has them, or where they have tensors that no other layer has. Layers like all
    others stay, so that a wrong number of layers is found.
    """
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return checkpoint
    declared = max(int(getattr(config, name, None) or 0) for name in DECLARED)
    heads = set()
    for stack, layers in _stacks(checkpoint.weights).items():
        # Towers of other kinds have other numbers of layers.
        if set(range(count)) <= set(layers):
            ordinary = {name for layer in range(count) for name in layers[layer]}
            more = (layer for layer in layers if layer >= count)
            heads |= {(stack, layer) for layer in more if layer < count + declared or not layers[layer] <= ordinary}
    if not heads:
        return checkpoint
    kept = {key: entry for key, entry in checkpoint.tensors.items() if _place(key) not in heads}
    packed = {key: weight for key, weight in checkpoint.packed.items() if _place(key) not in heads}
    return replace(checkpoint, tensors=kept, packed=packed)


def _stacks(tensors: Mapping[str, object]) -> dict[str, dict[int, set[str]]]:
    """For each stack of layers, by its prefix, the names of each layer's tensors; experts' numbers are left out."""
    found: dict[str, dict[int, set[str]]] = {}
    for key in tensors:
        match = LAYER.match(key)
        if match is not None:
            names = found.setdefault(match[1], {}).setdefault(int(match[2]), set())
            names.add(re.sub(r"\.\d+\.", ".", match[3]))
    return found


def _place(key: str) -> tuple[str, int] | None:
    match = LAYER.match(key)
    return (match[1], int(match[2])) if match is not None else None
