"""A GGUF file as a checkpoint: its tensors by the names that transformers knows, each read as it lies in the file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.checkpoint.foreign.config_values import MAX_LAYERS
from edgemoe.checkpoint.gguf.gguf_config import config_of
from edgemoe.checkpoint.gguf.gguf_file import GgufFile, GgufTensor
from edgemoe.checkpoint.gguf.gguf_names import ARCHITECTURES, IGNORED, NEXTN, TOP, Names
from edgemoe.checkpoint.packed.packed_tensor import MergedTensor, PackedTensor, Weight
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.errors import CheckpointError, told_as
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.values import shown

LAYER = re.compile(r"^blk\.(\d{1,6})\.(.+)$")
OLD_EXPERT = re.compile(r"^ffn_(gate|up|down)\.(\d+)\.weight$")
"""Mixtral's experts one by one, in files of early 2024."""
OLD_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}
GATE_UP = ("ffn_gate_exps", "ffn_up_exps")


def gguf_config(file: GgufFile, name: str) -> dict[str, Any]:
    """The configuration that the metadata of `file` stand for.

    Raises CheckpointError, with the architecture, where there is no rule for it or the metadata lack something.
    """
    # Of a file that says nothing, the architecture is told.
    if file.get("block_count") and not file.get("expert_count"):
        raise CheckpointError(
            f"{name} is not a Mixture-of-Experts model ({file.architecture} without experts): "
            "edgemoe reads no other GGUF files"
        )
    layers = file.get("block_count")
    if layers is not None and not (type(layers) is int and 1 <= layers <= MAX_LAYERS):
        raise CheckpointError(
            f"{name}: block_count is {shown(layers)}, and must be an integer from 1 to {MAX_LAYERS}: "
            "fetch the file again"
        )
    incomplete = f"{name} ({file.architecture}) does not say its configuration"
    with told_as(lambda why: CheckpointError(f"{incomplete}: {why}")):
        found = config_of(file)
    if found is None:
        raise _unknown(file, name)
    return found


def _surplus(file: GgufFile, key: str, name: str) -> CheckpointError:
    return CheckpointError(f"{name} has the tensor {key}, which {file.architecture} does not: use another file")


def _unknown(file: GgufFile, name: str) -> CheckpointError:
    known = ", ".join(ARCHITECTURES)
    return CheckpointError(
        f"{name} is of the architecture {file.architecture}, and edgemoe reads {known}: use its safetensors"
    )


def gguf_weights(file: GgufFile, name: str) -> dict[str, Weight]:
    """The weights of `file` by their names in transformers.

    Layers after the last one are draft heads. Raises CheckpointError for a tensor without a name there.
    """
    names = ARCHITECTURES.get(file.architecture)
    if names is None:
        raise _unknown(file, name)
    by_layer: dict[int, dict[str, GgufTensor]] = {}
    found: dict[str, Weight] = {}
    for key, tensor in file.tensors.items():
        match = LAYER.match(key)
        if match is not None:
            by_layer.setdefault(int(match[1]), {})[match[2]] = tensor
        elif key.partition(".")[0] not in IGNORED:
            base, _, end = key.partition(".")
            if base not in TOP:
                raise _surplus(file, key, name)
            found[f"{TOP[base]}.{end}"] = _weight(file, names, base, tensor)
    for layer, tensors in by_layer.items():
        for place, weight in _of_layer(file, names, tensors, name):
            found[f"model.layers.{layer}.{place}"] = weight
    return found


def _of_layer(
    file: GgufFile, names: Names, tensors: Mapping[str, GgufTensor], name: str
) -> Iterator[tuple[str, Weight]]:
    left = dict(tensors)
    yield from _experts(names, left)
    for sources, (place, merge) in names.merges.items():
        if all(f"{each}.weight" in left for each in sources):
            parts = tuple(_packed(left.pop(f"{each}.weight")) for each in sources)
            yield place, MergedTensor(parts, merge(file))
    for key, tensor in left.items():
        base, _, end = key.partition(".")
        old = OLD_EXPERT.match(key)
        if old is not None:
            yield f"block_sparse_moe.experts.{old[2]}.{OLD_NAMES[old[1]]}.weight", _as_it_is(tensor)
        elif key in names.whole:
            yield names.whole[key], _weight(file, names, base, tensor)
        elif base in names.layer:
            yield f"{names.layer[base]}.{end}", _weight(file, names, base, tensor)
        elif base == "nextn" and end.partition(".")[0] in NEXTN:
            part, _, end = end.partition(".")
            # The converter treats a head's norms as all others.
            yield f"{NEXTN[part]}.{end}", _weight(file, names, "output_norm" if "norm" in part else part, tensor)
        elif base not in IGNORED:
            raise _surplus(file, key, name)


def _experts(names: Names, left: dict[str, GgufTensor]) -> Iterator[tuple[str, Weight]]:
    """The stacks of all experts, and their biases, taken out of `left`."""
    down, joined = left.pop("ffn_down_exps.weight", None), left.pop("ffn_gate_up_exps.weight", None)
    if down is not None:
        yield f"{names.experts}.down_proj", _stack(names, (down,))
    if joined is not None:
        yield f"{names.experts}.gate_up_proj", _stack(names, (joined,))
    if all(f"{each}.weight" in left for each in GATE_UP):
        yield f"{names.experts}.gate_up_proj", _stack(names, tuple(left.pop(f"{each}.weight") for each in GATE_UP))
    if all(f"{each}.bias" in left for each in GATE_UP):
        yield f"{names.experts}.gate_up_proj_bias", _biases(names, tuple(left.pop(f"{each}.bias") for each in GATE_UP))
    bias = left.pop("ffn_down_exps.bias", None)
    if bias is not None:
        yield f"{names.experts}.down_proj_bias", _as_it_is(bias)


def _stack(names: Names, parts: tuple[GgufTensor, ...]) -> Weight:
    """One parameter of an experts module, of one stack in the file or of two whose rows it has."""
    first = parts[0]
    experts, height, columns = first.shape
    if len(parts) == 1:
        if isinstance(first.format, FloatFormat) and not names.transposed:
            return _as_it_is(first)
        return PackedTensor(first.format, {"": _entry(first)}, height, columns, experts, names.transposed)
    if any(part.shape != first.shape for part in parts):
        raise CheckpointError(f"stacks of experts are {[list(part.shape) for part in parts]}: fetch the file again")
    return _together(names, parts, height, columns)


def _biases(names: Names, parts: tuple[GgufTensor, ...]) -> PackedTensor:
    """The biases of gate and up in the order of the rows: matrices of one column."""
    joined = _together(names, parts, parts[0].shape[1], 1)
    return replace(joined, transposed=False, reshape=lambda stack: stack.squeeze(-1))


def _together(names: Names, parts: tuple[GgufTensor, ...], height: int, columns: int) -> PackedTensor:
    """Stacks of matrices of `height` rows as one, in the order of rows that transformers wants."""
    kind = StackedFormat(tuple(part.format for part in parts), height, names.interleaved)
    stored = {f".{at}": _entry(part) for at, part in enumerate(parts)}
    return PackedTensor(kind, stored, height * len(parts), columns, parts[0].shape[0], names.transposed)


def _weight(file: GgufFile, names: Names, base: str, tensor: GgufTensor) -> Weight:
    """A tensor outside of the experts, with what the converter has changed undone."""
    change = names.changes.get(base)
    if change is None:
        return _as_it_is(tensor)
    shape, run = tensor.shape, change(file)
    packed = _packed(tensor)
    return PackedTensor(
        packed.format, packed.stored, packed.rows, packed.columns, reshape=lambda matrix: run(matrix.reshape(shape))
    )


def _as_it_is(tensor: GgufTensor) -> Weight:
    return _entry(tensor) if isinstance(tensor.format, FloatFormat) else _packed(tensor)


def _packed(tensor: GgufTensor) -> PackedTensor:
    """A tensor of any number of dimensions as rows."""
    *outer, columns = tensor.shape
    rows = math.prod(outer)
    reshape = None if len(tensor.shape) == 2 else lambda matrix: matrix.reshape(tensor.shape)
    return PackedTensor(tensor.format, {"": _entry(tensor)}, rows, columns, reshape=reshape)


def _entry(tensor: GgufTensor) -> TensorEntry:
    """The place of the bytes: rows of blocks, or floats."""
    (part,) = tensor.format.parts("", (1, tensor.shape[-1]))
    return TensorEntry(tensor.file, tensor.offset, tensor.nbytes, (*tensor.shape[:-1], part.shape[-1]), part.dtype)
