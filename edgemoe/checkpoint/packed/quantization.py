"""Checkpoints that say `quantization_config`: which of their tensors make up which packed weight.

Names and layouts are those of the libraries that write them. What cannot be read is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgemoe.checkpoint.foreign.foreign_json import parse_json
from edgemoe.checkpoint.packed.packed_names import TRANSPOSED
from edgemoe.checkpoint.packed.packed_tensor import PackedTensor, fits
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.errors import CheckpointError, told_as
from edgemoe.formats.bnb_format import BnbFourBitFormat, BnbInt8Format
from edgemoe.formats.fp8_format import Fp8Format
from edgemoe.formats.gptq_format import GptqFormat
from edgemoe.formats.int_group_format import IntGroupFormat
from edgemoe.formats.mxfp4_format import GROUP as MXFP4_GROUP
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.formats.nvfp4_format import Nvfp4Format

Tensors = Mapping[str, TensorEntry]
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_STATE = 1 << 20
"""Bytes of what bitsandbytes says of one weight."""
WIDTHS = (2, 4, 8)
"""Bits of integers that fill their words."""


@dataclass(frozen=True)
class Unpacked:
    """What is left of a checkpoint's tensors, and its packed weights by their names in transformers."""

    tensors: Tensors
    packed: Mapping[str, PackedTensor]


@dataclass(frozen=True)
class Found:
    """A packed weight, and the tensors that belong to it: those it is made of, and others that say nothing here."""

    name: str
    weight: PackedTensor
    used: tuple[str, ...]


Read = Callable[[int, int, int], bytes]
"""Bytes of a file: its number, an offset and a count."""


def unpack(tensors: Tensors, config: Mapping[str, Any], name: str, read: Read) -> Unpacked:
    """Groups the tensors of the checkpoint `name` by `config`, its quantization_config.

    Raises CheckpointError, with the method and what is not read, for anything that would be read wrongly.
    """
    method = check_method(config, name)
    reader = METHODS[method]
    left, packed = dict(tensors), {}
    unreadable = f"{name} says of its quantisation ({method}) what cannot be read"
    with told_as(lambda why: CheckpointError(f"{unreadable}: {why}: fetch it again"), of_files=True):
        for found in reader(tensors, config, read):
            _check(found)
            packed[found.name] = found.weight
            for key in found.used:
                left.pop(key, None)
    if not packed:
        raise CheckpointError(f"{name} says that it is quantised ({method}), and has no packed weights: fetch it again")
    return Unpacked(left, packed)


def check_method(config: Mapping[str, Any], name: str) -> str:
    """The method of a quantization_config. Raises CheckpointError for one that is not read."""
    method = str(config.get("quant_method", "unknown")).lower()
    if method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise CheckpointError(f"{name} is quantised ({method}), and edgemoe reads {known}: use another version of it")
    return method


def _check(found: Found) -> None:
    weight = found.weight
    if weight.convert is not None:
        return
    for part in weight.parts(""):
        entry = weight.stored.get(part.name)
        if entry is None or not fits(part, entry, weight.experts):
            said = "is missing" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
            raise ValueError(
                f"{found.name}{part.name} {said}, where {weight.format.name} needs {part.dtype} {list(part.shape)}"
            )


# --- one method after the other -------------------------------------------------------------------------


def _fp8(tensors: Tensors, config: Mapping[str, Any], read: Read) -> Iterator[Found]:
    """Blocks of 128 x 128 with `weight_scale_inv` (DeepSeek, Qwen, MiniMax), or one scale a matrix or row."""
    block = config.get("weight_block_size")
    for key, entry in tensors.items():
        scale = _first(tensors, f"{key}_scale_inv", f"{key}_scale")
        if entry.dtype in FP8 and scale is not None and len(entry.shape) in (2, 3):
            yield _scaled(key, entry, tensors[scale], scale, block, tensors)


def _scaled(key: str, entry: TensorEntry, scale: TensorEntry, scale_key: str, block: Any, tensors: Tensors) -> Found:
    rows, columns = entry.shape[-2:]
    sides = scale.shape[-2:] if len(scale.shape) > 1 else (math.prod(scale.shape), 1)
    if block is not None and math.prod(scale.shape) > 1:
        size = (int(block[0]), int(block[1]))
    else:
        size = (1 if sides[0] == rows and rows > 1 else 0, 0)
    weight = PackedTensor(
        Fp8Format(size, entry.dtype, scale.dtype),
        {"": entry, ".scale": scale},
        rows,
        columns,
        entry.shape[0] if len(entry.shape) == 3 else None,
    )
    base = key.removesuffix("weight")
    return Found(key, weight, _used(tensors, key, scale_key, f"{base}input_scale", f"{base}activation_scale"))


def _mxfp4(tensors: Tensors, config: Mapping[str, Any], read: Read) -> Iterator[Found]:
    """gpt-oss: stacks of blocks and scales, which transformers widens to [experts, inputs, outputs]."""
    for key, entry in tensors.items():
        if key.endswith("_blocks") and len(entry.shape) == 4:
            name = key.removesuffix("_blocks")
            experts, rows, groups, _ = entry.shape
            stored = {"": entry, ".scale": tensors[f"{name}_scales"]}
            weight = PackedTensor(Mxfp4Format(), stored, rows, groups * MXFP4_GROUP, experts, transposed=True)
            yield Found(name, weight, (key, f"{name}_scales"))


def _compressed(tensors: Tensors, config: Mapping[str, Any], read: Read) -> Iterator[Found]:
    """compressed-tensors: `pack-quantized` integers, `nvfp4-pack-quantized`, and 8-bit floats."""
    groups = list(config["config_groups"].values())
    unread = [each for each in groups if (each.get("weights") or {}).get("type", "int") not in ("int", "float")]
    if unread or config.get("sparsity_config"):
        raise ValueError("sparse weights, or weights of another type than int and float")
    bits = {int(each["weights"]["num_bits"]) for each in groups if each.get("weights")}
    for key, entry in tensors.items():
        base = key.removesuffix("weight_packed")
        if key.endswith(".weight_packed") and f"{base}weight_global_scale" in tensors:
            yield _nvfp4(base, entry, f"{base}weight_global_scale", tensors, divides=True)
        elif key.endswith("_packed"):
            yield _int_groups(key.removesuffix("_packed"), entry, bits, tensors, read, config)
        elif key.endswith(".weight") and entry.dtype in FP8 and f"{key}_scale" in tensors:
            yield _scaled(key, entry, tensors[f"{key}_scale"], f"{key}_scale", None, tensors)
        elif key.endswith(".weight") and entry.dtype is torch.int8:
            raise ValueError(f"{key} is int8, which is not read in this format")


def _int_groups(
    name: str, entry: TensorEntry, bits: set[int], tensors: Tensors, read: Read, config: Mapping[str, Any]
) -> Found:
    scale, shape = tensors[f"{name}_scale"], tensors[f"{name}_shape"]
    zero, order = tensors.get(f"{name}_zero_point"), tensors.get(f"{name}_g_idx")
    *stack, rows, columns = _whole_numbers(shape, read)
    width = next((each for each in sorted(bits) if -(-columns * each // 32) == entry.shape[-1]), 0)
    if width not in WIDTHS:
        raise ValueError(f"{name}_packed has {entry.shape[-1]} words for {columns} values of {sorted(bits)} bits")
    groups = scale.shape[-1] if len(scale.shape) > 1 else 1
    kind = IntGroupFormat(
        width, -(-columns // groups) if groups > 1 else 0, scale.dtype, zero is not None, order is not None
    )
    candidates = {"": entry, ".scale": scale, ".zero": zero, ".group": order, ".shape": shape}
    wanted = {part.name for part in kind.parts("", (rows, columns))}
    stored = {suffix: each for suffix, each in candidates.items() if each is not None and suffix in wanted}
    names = ("packed", "scale", "shape", "zero_point", "g_idx")
    return Found(
        name,
        PackedTensor(kind, stored, rows, columns, *_stacked(name, stack, config)),
        _used(tensors, *(f"{name}_{each}" for each in names)),
    )


def _stacked(name: str, stack: Sequence[int], config: Mapping[str, Any]) -> tuple[int | None, bool]:
    """How many matrices the weight `name` has, None for a single one, and whether transformers' are transposed."""
    if len(stack) > 1:
        raise ValueError(f"{name} has {len(stack) + 2} dimensions")
    return (stack[0], name in config.get(TRANSPOSED, ())) if stack else (None, False)


def _nvfp4(base: str, entry: TensorEntry, factor: str, tensors: Tensors, *, divides: bool) -> Found:
    stored = {"": entry, ".scale": tensors[f"{base}weight_scale"], ".factor": tensors[factor]}
    weight = PackedTensor(Nvfp4Format(divides), stored, entry.shape[0], 2 * entry.shape[1])
    names = ("weight_packed", "weight", "weight_scale", "input_global_scale", "input_scale")
    return Found(f"{base}weight", weight, _used(tensors, factor, *(f"{base}{each}" for each in names)))


def _modelopt(tensors: Tensors, config: Mapping[str, Any], read: Read) -> Iterator[Found]:
    """NVIDIA's: `weight`, `weight_scale` and `weight_scale_2` of NVFP4, or 8-bit floats with `weight_scale`."""
    for key, entry in tensors.items():
        base = key.removesuffix("weight")
        if not key.endswith(".weight"):
            continue
        if entry.dtype is torch.uint8 and f"{key}_scale_2" in tensors:
            yield _nvfp4(base, entry, f"{key}_scale_2", tensors, divides=False)
        elif entry.dtype in FP8 and f"{key}_scale" in tensors:
            yield _scaled(key, entry, tensors[f"{key}_scale"], f"{key}_scale", None, tensors)


def _gptq(tensors: Tensors, config: Mapping[str, Any], read: Read) -> Iterator[Found]:
    """GPTQ in both layouts, with `desc_act` or without."""
    newer = str(config.get("checkpoint_format", config.get("format", "gptq"))).endswith("v2")
    yield from _words(tensors, config, awq=False, offset=0 if newer else 1)


def _awq(tensors: Tensors, config: Mapping[str, Any], read: Read) -> Iterator[Found]:
    """AutoAWQ's `gemm`."""
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version != "gemm":
        raise ValueError(f"the version {version}, of which only gemm is read")
    yield from _words(tensors, config, awq=True, offset=0)


def _auto_round(tensors: Tensors, config: Mapping[str, Any], read: Read) -> Iterator[Found]:
    """auto-round packs as GPTQ or AWQ do, and says so in `packing_format`."""
    packing = str(config.get("packing_format", "auto_round:auto_gptq")).lower()
    if "awq" in packing:
        yield from _words(tensors, config, awq=True, offset=0)
    elif "gptq" in packing:
        newer = "gptqmodel" in packing or packing.endswith("v2")
        yield from _words(tensors, config, awq=False, offset=0 if newer else 1)
    else:
        raise ValueError(f"the packing format {packing}")


def _words(tensors: Tensors, config: Mapping[str, Any], *, awq: bool, offset: int) -> Iterator[Found]:
    bits = int(config.get("bits", config.get("w_bit", 4)))
    if bits not in WIDTHS or (awq and bits != 4):
        raise ValueError(f"weights of {bits} bits")
    for key, entry in tensors.items():
        if not key.endswith(".qweight"):
            continue
        base = key.removesuffix("qweight")
        scale, zero, order = (tensors.get(f"{base}{each}") for each in ("scales", "qzeros", "g_idx"))
        if scale is None or zero is None:
            raise ValueError(f"{base}scales or {base}qzeros is missing")
        inputs = entry.shape[0] if awq else entry.shape[0] * 32 // bits
        outputs, groups = scale.shape[1], scale.shape[0]
        # The order of the inputs is written in any case, and matters only with `desc_act`.
        reordered = order is not None and bool(config.get("desc_act", False))
        size = int(config.get("group_size", config.get("q_group_size", -1)))
        group = size if size > 0 else 0
        if groups != (-(-inputs // group) if group else 1):
            raise ValueError(f"{base}scales has {groups} groups for {inputs} inputs in groups of {size}")
        kind = GptqFormat(bits, group, scale.dtype, awq, offset, reordered)
        stored = {"": entry, ".zero": zero, ".scale": scale}
        if reordered and order is not None:
            stored[".group"] = order
        used = _used(tensors, *(f"{base}{each}" for each in ("qweight", "qzeros", "scales", "g_idx")))
        yield Found(f"{base}weight", PackedTensor(kind, stored, outputs, inputs), used)


def _bitsandbytes(tensors: Tensors, config: Mapping[str, Any], read: Read) -> Iterator[Found]:
    """4 bits with a `quant_state` for each weight, or 8 bits with `SCB`."""
    for key, entry in tensors.items():
        base = key.removesuffix("weight") if key.endswith(".weight") else f"{key}."
        state = next((name for name in (f"{key}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
                      if name in tensors), None)  # fmt: skip
        if state is not None:
            yield _four_bit(key, entry, state, tensors, read, config)
        elif entry.dtype is torch.int8 and f"{base}SCB" in tensors:
            stored = {"": entry, ".scb": tensors[f"{base}SCB"]}
            used = _used(tensors, key, f"{base}SCB", f"{base}weight_format")
            *stack, rows, columns = entry.shape
            weight = PackedTensor(BnbInt8Format(), stored, rows, columns, *_stacked(key, stack, config))
            yield Found(key, weight, used)


def _four_bit(
    key: str, entry: TensorEntry, state: str, tensors: Tensors, read: Read, config: Mapping[str, Any]
) -> Found:
    place = tensors[state]
    said: dict[str, Any] = parse_json(read(place.file, place.offset, min(place.nbytes, MAX_STATE)))
    *stack, rows, columns = (int(side) for side in said["shape"])
    kind = BnbFourBitFormat(state.rpartition("__")[2], columns, int(said["blocksize"]))
    table = tensors[f"{key}.quant_map"]
    experts, transposed = _stacked(key, stack, config)
    # A stack has one table for all of its matrices, which each record has for itself.
    shared = table if experts is None else replace(table, repeated=True)
    stored = {"": entry, ".absmax": tensors[f"{key}.absmax"], ".quant_map": shared}
    used = _used(tensors, key, state, *(f"{key}.{each}" for each in ("absmax", "quant_map")))
    nested = tensors.get(f"{key}.nested_absmax")
    if nested is None:
        return Found(key, PackedTensor(kind, stored, rows, columns, experts, transposed), used)
    if experts is not None:
        raise ValueError(f"{key} is a stack with packed maxima")
    stored |= {".nested_absmax": nested, ".nested_quant_map": tensors[f"{key}.nested_quant_map"]}
    block, offset = int(said["nested_blocksize"]), float(said["nested_offset"])

    def convert(raw: Any) -> dict[str, torch.Tensor]:
        codes, maxima, table, own, own_table = raw
        spread = own.repeat_interleave(block)[: len(maxima)]
        return {"": codes, ".absmax": own_table[maxima.long()] * spread + offset, ".quant_map": table}

    more = _used(tensors, f"{key}.nested_absmax", f"{key}.nested_quant_map")
    return Found(key, PackedTensor(kind, stored, rows, columns, convert=convert), used + more)


METHODS: dict[str, Callable[[Tensors, Mapping[str, Any], Read], Iterator[Found]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "bitsandbytes": _bitsandbytes,
}
"""What reads each `quant_method`."""


def _first(tensors: Tensors, *names: str) -> str | None:
    return next((name for name in names if name in tensors), None)


def _used(tensors: Tensors, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in tensors)


def _whole_numbers(entry: TensorEntry, read: Read) -> list[int]:
    """The numbers of a small tensor."""
    if not 2 <= math.prod(entry.shape) <= 3:
        raise ValueError(f"a shape of {math.prod(entry.shape)} numbers")
    raw = bytearray(read(entry.file, entry.offset, entry.nbytes))
    return [int(number) for number in torch.frombuffer(raw, dtype=entry.dtype).tolist()]
