"""How quantised weights are called in a checkpoint: the tensors that libraries write for a matrix, and their config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgemoe.formats.bnb_format import BnbFourBitFormat, BnbInt8Format
from edgemoe.formats.int_group_format import IntGroupFormat
from edgemoe.formats.weight_format import WeightFormat

TRANSPOSED = "transposed_stacks"
"""The entry of a quantization_config that lists stacks of matrices which transformers has as [inputs, outputs]."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its name, shape and dtype, and the part of the format that it holds."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    suffix: str | None
    """The suffix of the part; None for one that only says what the others are."""


def stored_tensors(key: str, kind: WeightFormat, rows: int, columns: int, experts: int | None) -> list[StoredTensor]:
    """The tensors for the weight `key`, a matrix or a stack of `experts`, in the order of the format's parts."""
    stack = () if experts is None else (experts,)
    found = []
    for part in kind.parts("", (rows, columns)):
        if isinstance(kind, BnbFourBitFormat) and part.name == ".quant_map":
            # The table is the same for all matrices of a stack.
            found.append(StoredTensor(f"{key}.quant_map", part.shape, part.dtype, part.name))
        elif part.name != ".shape":
            found.append(StoredTensor(_name(key, kind, part.name), (*stack, *part.shape), part.dtype, part.name))
    return found + _descriptions(key, kind, (*stack, rows, columns))


def _name(key: str, kind: WeightFormat, suffix: str) -> str:
    if isinstance(kind, IntGroupFormat):
        return f"{key}_packed" if not suffix else f"{key}_{suffix[1:]}"
    if isinstance(kind, BnbInt8Format) and suffix:
        return f"{key.removesuffix('weight')}SCB" if key.endswith(".weight") else f"{key}.SCB"
    return key + suffix


def _descriptions(key: str, kind: WeightFormat, shape: tuple[int, ...]) -> list[StoredTensor]:
    if isinstance(kind, BnbFourBitFormat):
        state = description(kind, shape)
        return [StoredTensor(f"{key}.quant_state.bitsandbytes__{kind.kind}", tuple(state.shape), state.dtype, None)]
    if isinstance(kind, IntGroupFormat):
        return [StoredTensor(f"{key}_shape", (len(shape),), torch.int64, None)]
    return []


def description(kind: WeightFormat, shape: Sequence[int]) -> torch.Tensor:
    """What the tensor of `stored_tensors` without a suffix holds, for a weight of `shape`."""
    if isinstance(kind, BnbFourBitFormat):
        said = {"quant_type": kind.kind, "blocksize": kind.block, "dtype": "bfloat16", "shape": list(shape)}
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return torch.tensor(list(shape), dtype=torch.int64)


def quantization_config(kinds: Mapping[str, WeightFormat], transposed: Sequence[str]) -> dict[str, Any]:
    """The config.json's `quantization_config` for weights in `kinds`, by key; `transposed` are stacks among them."""
    made = set(kinds.values())
    more = {TRANSPOSED: sorted(transposed)} if transposed else {}
    four = next((each for each in made if isinstance(each, BnbFourBitFormat)), None)
    groups = {each for each in made if isinstance(each, IntGroupFormat)}
    if groups:
        return _compressed_config(kinds, groups) | more
    if four is not None:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": four.kind,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
        } | more
    return {"quant_method": "bitsandbytes", "load_in_8bit": True} | more


def _compressed_config(kinds: Mapping[str, WeightFormat], groups: set[IntGroupFormat]) -> dict[str, Any]:
    """compressed-tensors': a group of layers for each size of the groups of values."""
    found = {}
    for number, kind in enumerate(sorted(groups, key=lambda each: each.group)):
        layers = sorted(key.removesuffix(".weight") for key, own in kinds.items() if own == kind)
        found[f"group_{number}"] = {
            "targets": ["Linear"] if len(groups) == 1 else layers,
            "weights": {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if kind.group else "channel",
                "group_size": kind.group or None,
                "dynamic": False,
            },
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": found,
        "ignore": ["lm_head"],
    }
