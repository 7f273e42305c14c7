"""The file with the similarities of a checkpoint's experts: computed once, then read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.foreign.foreign_json import parse_json
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.draft.affinity import Affinity, compute
from edgemoe.errors import reading
from edgemoe.results import Progress

NAME = "affinity.safetensors"
METADATA = {"format": "edgemoe affinity", "version": "1"}
HEADER_NBYTES = 1 << 20
"""Upper bound of the file's header, for any number of layers."""


class Prepared(NamedTuple):
    """The result of `prepare`."""

    affinity: Affinity
    path: Path
    """The file."""
    was_kept: bool
    """Whether the file existed before."""


def read(state: StateFolder, experts: Sequence[int]) -> Affinity | None:
    """The similarities kept for a model with `experts[layer]` experts per layer; None without a valid file."""
    data = state.read(NAME, 2 * sum(count * count for count in experts) + HEADER_NBYTES)
    if data is None or _metadata(data) != METADATA:
        return None
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    if set(tensors) != {str(layer) for layer in range(len(experts))}:
        return None
    ranks = [tensors[str(layer)] for layer in range(len(experts))]
    sound = all(_is_sound(layer, count) for layer, count in zip(ranks, experts, strict=True))
    return Affinity(ranks) if sound else None


def write(state: StateFolder, affinity: Affinity) -> None:
    """Writes `affinity`, which replaces what was kept. Raises OSError when the folder takes no files."""
    tensors = {str(layer): ranks for layer, ranks in enumerate(affinity.ranks)}
    state.write(NAME, save(tensors, metadata=METADATA))


def prepare(
    blueprint: Blueprint,
    folder: str | os.PathLike[str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Prepared | None:
    """Reads the similarities of a model's experts from `folder` (see `StateFolder.of`), or computes and writes them.

    None once `cancelled` returns True. Raises CheckpointError as `compute` does and for files that cannot be read, and
    OSError when `folder` takes no files, if possible before the similarities are computed.
    """
    state = StateFolder.of(blueprint.checkpoint, folder)
    layouts = [moe.layout for moe in blueprint.experts_modules]
    kept = read(state, [moe.experts for moe in blueprint.experts_modules])
    if kept is not None and state.path is not None:
        return Prepared(kept, state.path / NAME, was_kept=True)
    state.probe()
    with reading(blueprint.checkpoint.name):
        # Every byte is read once, so the page cache is bypassed.
        checkpoint = blueprint.checkpoint
        store = SafetensorsStore(
            checkpoint.files, layouts, blueprint.records, direct=True, identities=checkpoint.identities
        )
        try:
            made = compute(store, on_progress, cancelled)
        finally:
            store.close()
    if made is None or state.path is None:
        return None
    write(state, made)
    return Prepared(made, state.path / NAME, was_kept=False)


def _metadata(data: bytes) -> object:
    """The metadata in the header of a safetensors file; None for a broken header."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = parse_json(data[8 : 8 + length], unique=True)
    except ValueError:
        return None
    return header.get("__metadata__") if isinstance(header, dict) else None


def _is_sound(ranks: torch.Tensor, experts: int) -> bool:
    """Whether every row ranks all experts, with the row's own expert first."""
    if ranks.dtype != torch.int16 or ranks.shape != (experts, experts) or ranks.diagonal().any():
        return False
    return torch.equal(ranks.sort(dim=1).values, torch.arange(experts, dtype=torch.int16).expand(experts, -1))
