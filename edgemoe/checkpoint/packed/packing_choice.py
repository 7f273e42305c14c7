"""Which weights of a checkpoint `packing` quantises, and how each is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.errors import CheckpointError
from edgemoe.formats.made import made_format
from edgemoe.formats.weight_format import MakeableFormat


@dataclass(frozen=True)
class Chosen:
    """A weight that is quantised: a matrix, or a stack of them."""

    format: MakeableFormat
    rows: int
    columns: int
    experts: int | None
    """The matrices of a stack; None for a single one."""
    transposed: bool
    """Whether the checkpoint has matrices as [columns, rows]."""

    def quantized(self, read: Callable[[TensorEntry], torch.Tensor], entry: TensorEntry) -> dict[str, torch.Tensor]:
        """The parts of the weight, stacked like it, by suffix. Reads a matrix at a time."""
        if self.experts is None:
            return self._matrix(read(entry))
        made = [self._matrix(read(entry.slice(number, self.experts))) for number in range(self.experts)]
        # The table of 4-bit codes is one for all.
        return {
            suffix: part if suffix == ".quant_map" else torch.stack([each[suffix] for each in made])
            for suffix, part in made[0].items()
        }

    def _matrix(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.format.quantize(matrix.t() if self.transposed else matrix)


def chosen_weights(blueprint: Blueprint) -> dict[str, Chosen]:
    """What is quantised of the checkpoint of `blueprint`, by its keys.

    Raises CheckpointError where nothing is, where the checkpoint is packed already, and where the formats do not go
    together in one checkpoint.
    """
    source, experts, dense = blueprint.checkpoint, blueprint.made_experts, blueprint.made_dense
    if source.packed:
        raise CheckpointError(f"{source.name} is packed already: pack the one with float weights that it was made of")
    if experts is None and dense is None:
        raise CheckpointError(f"nothing of {source.name} would be packed: give a format as experts= or dense=")
    if experts is not None and dense is not None and _method(experts) != _method(dense):
        raise CheckpointError(
            f"a checkpoint says one way of packing, and experts in {experts} are packed in another than other "
            f"matrices in {dense}: give dense={experts if experts in ('nf4', 'int8') else 'native'}"
        )
    chosen = _experts(blueprint, experts) if experts is not None else {}
    return chosen | {
        each.key: Chosen(each.format, each.rows, each.columns, None, False)
        for each in blueprint.packed_modules
        if isinstance(each.source, TensorEntry) and isinstance(each.format, MakeableFormat)
    }


def _method(name: str) -> str:
    return "4 bits of bitsandbytes" if name in ("nf4", "fp4") else name


def _experts(blueprint: Blueprint, name: str) -> dict[str, Chosen]:
    counts = {moe.experts for moe in blueprint.experts_modules}
    transposed_names = {each for moe in blueprint.experts_modules for each in moe.declared_transposed}
    dense, found = set(blueprint.dense_keys), {}
    for key, entry in blueprint.checkpoint.tensors.items():
        is_stack = len(entry.shape) == 3 and entry.shape[0] in counts
        if key in dense or not (is_stack or len(entry.shape) == 2) or _is_bias(key):
            continue
        transposed = is_stack and key.rpartition(".")[2] in transposed_names
        rows, columns = entry.shape[-2:][::-1] if transposed else entry.shape[-2:]
        stack = entry.shape[0] if is_stack else None
        found[key] = Chosen(made_format(name, columns), rows, columns, stack, transposed)
    return found


def _is_bias(key: str) -> bool:
    """Whether a matrix is a stack of biases."""
    return key.endswith(("bias", "_bias"))
