"""Packs the weights of tiny checkpoints into the formats that people publish, in the plainest way that is valid.

Each packer gives the tensors of one matrix as a file has them, by the ends of their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.foreign.safetensors_table import read_table
from edgemoe.formats.codes import E2M1

Stored = dict[str, torch.Tensor]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """One way of publishing weights: the quantization_config, and the tensors of a matrix `base`weight."""

    config: dict[str, Any]
    pack: Callable[[torch.Tensor], Stored]
    """Of a float matrix [rows, columns]: the tensors by what follows `base`."""
    widths: int = 8
    """What the sides of a matrix must be multiples of."""


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (values.unsqueeze(-1) - table).abs().argmin(-1)


def _pairs(codes: torch.Tensor, *, low_first: bool = True) -> torch.Tensor:
    first, second = codes[..., 0::2].to(torch.uint8), codes[..., 1::2].to(torch.uint8)
    return first | (second << 4) if low_first else second | (first << 4)


def words(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unsigned `values` packed along `dim` into int32, lowest first."""
    per = 32 // bits
    parts = values.long().unflatten(dim, (-1, per))
    shape = [1] * parts.dim()
    shape[dim + 1 if dim >= 0 else parts.dim() + dim] = per
    found = (parts << torch.arange(0, 32, bits).view(shape)).sum(dim + 1 if dim >= 0 else dim)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def fp8(matrix: torch.Tensor, block: int = 128) -> Stored:
    """8-bit floats with a scale for each block."""
    rows, columns = matrix.shape
    scales = torch.zeros(-(-rows // block), -(-columns // block))
    values = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            place = (slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block))
            scales[r, c] = matrix[place].abs().max().clamp_min(1e-8) / 448
            values[place] = (matrix[place] / scales[r, c]).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scales}


def compressed_int4(matrix: torch.Tensor, group: int = 32, *, zeros: bool = False, order: bool = False) -> Stored:
    """compressed-tensors' pack-quantized."""
    rows, columns = matrix.shape
    places = torch.arange(columns) // group
    if order:
        places = places[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    groups = columns // group
    scales, offsets = torch.zeros(rows, groups), torch.zeros(rows, groups, dtype=torch.long)
    codes = torch.zeros(rows, columns, dtype=torch.long)
    for g in range(groups):
        own = matrix[:, places == g]
        low, high = own.min(1).values, own.max(1).values
        scales[:, g] = ((high - low) / 15 if zeros else own.abs().max(1).values / 7).clamp_min(1e-8)
        offsets[:, g] = (-8 - (low / scales[:, g]).round()).clamp(-8, 7).long() if zeros else 0
        codes[:, places == g] = ((own / scales[:, g, None]).round() + offsets[:, g, None]).clamp(-8, 7).long()
    stored = {
        "weight_packed": words(codes + 8, 4, 1),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if zeros:
        stored["weight_zero_point"] = words((offsets + 8).t().contiguous(), 4, 1).t().contiguous()
    if order:
        stored["weight_g_idx"] = places.to(torch.int32)
    return stored


def nvfp4(matrix: torch.Tensor, *, divides: bool) -> Stored:
    """NVFP4 of compressed-tensors (`divides`) or of modelopt."""
    groups = matrix.unflatten(1, (-1, 16))
    factor = matrix.abs().max().clamp_min(1e-8) / (6 * 448)
    scales = (groups.abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)
    codes = _nearest(groups / (scales.float() * factor).clamp_min(1e-12).unsqueeze(-1), torch.tensor(E2M1)).flatten(1)
    packed = _pairs(codes)
    if divides:
        return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": (1 / factor).reshape(1)}
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": factor, "input_scale": torch.tensor(1.0)}


def gptq(matrix: torch.Tensor, group: int = 32, *, awq: bool = False, order: bool = False, offset: int = 1) -> Stored:
    """GPTQ's and AWQ's words along inputs and outputs."""
    inputs = matrix.t().contiguous()
    places = torch.arange(len(inputs)) // group
    if order:
        places = places[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(len(inputs)))]
    groups = len(inputs) // group
    scales, zeros = torch.zeros(groups, inputs.shape[1]), torch.zeros(groups, inputs.shape[1], dtype=torch.long)
    codes = torch.zeros(inputs.shape, dtype=torch.long)
    for g in range(groups):
        own = inputs[places == g]
        low, high = own.min(0).values, own.max(0).values
        scales[g] = ((high - low) / 15).clamp_min(1e-6).half().float()
        zeros[g] = (-low / scales[g]).round().clamp(0, 15).long()
        codes[places == g] = ((own / scales[g]).round() + zeros[g]).clamp(0, 15).long()
    kept = (zeros - offset) & 15
    if awq:
        order_of = [0, 2, 4, 6, 1, 3, 5, 7]

        def interleaved(values: torch.Tensor) -> torch.Tensor:
            return words(values.unflatten(1, (-1, 8))[..., order_of].flatten(1), 4, 1)

        return {"qweight": interleaved(codes), "qzeros": interleaved(kept), "scales": scales.half()}
    return {
        "qweight": words(codes, 4, 0),
        "qzeros": words(kept, 4, 1),
        "scales": scales.half(),
        "g_idx": places.to(torch.int32),
    }


def bnb_four_bit(matrix: torch.Tensor, kind: str = "nf4", *, nested: bool = False) -> Stored:
    """bitsandbytes' 4 bits, with packed maxima where they are `nested`."""
    table = torch.tensor(NF4 if kind == "nf4" else [value / 6 for value in E2M1])
    blocks = matrix.flatten().unflatten(0, (-1, 64))
    maxima = blocks.abs().amax(1)
    codes = _nearest(blocks / maxima.clamp_min(1e-12).unsqueeze(1), table).flatten()
    state: dict[str, Any] = {
        "quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(matrix.shape),
    }  # fmt: skip
    stored = {"weight": _pairs(codes, low_first=False).unsqueeze(1), "weight.quant_map": table}
    if nested:
        offset = maxima.mean()
        own_table = torch.linspace(-1, 1, 256)
        own = (maxima - offset).abs().unflatten(0, (-1, min(256, len(maxima)))).amax(1)
        spread = own.repeat_interleave(min(256, len(maxima)))
        stored["weight.absmax"] = _nearest((maxima - offset) / spread.clamp_min(1e-12), own_table).to(torch.uint8)
        stored |= {"weight.nested_absmax": own, "weight.nested_quant_map": own_table}
        state |= {"nested_blocksize": min(256, len(maxima)), "nested_offset": float(offset)}
        state |= {"nested_dtype": "float32"}
    else:
        stored["weight.absmax"] = maxima
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    return stored


def bnb_int8(matrix: torch.Tensor) -> Stored:
    """bitsandbytes' 8 bits."""
    scb = matrix.abs().amax(1)
    return {"weight": (matrix / scb.unsqueeze(1) * 127).round().to(torch.int8), "SCB": scb}


def _integers(**more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"weights": weights}},
    }


PACKINGS: dict[str, Packing] = {
    "fp8": Packing({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8, 1),
    "compressed int4": Packing(_integers(), compressed_int4, 32),
    "compressed int4 asymmetric": Packing(_integers(symmetric=False), lambda m: compressed_int4(m, zeros=True), 32),
    "compressed int4 actorder": Packing(_integers(actorder="group"), lambda m: compressed_int4(m, order=True), 32),
    "compressed nvfp4": Packing(
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
        },
        lambda m: nvfp4(m, divides=True),
        16,
    ),
    "modelopt nvfp4": Packing(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, lambda m: nvfp4(m, divides=False), 16
    ),
    "gptq": Packing({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, gptq, 32),
    "gptq desc_act": Packing(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, lambda m: gptq(m, order=True), 32
    ),
    "gptq v2": Packing(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        lambda m: gptq(m, offset=0),
        32,
    ),
    "awq": Packing(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        lambda m: gptq(m, awq=True, offset=0),
        32,
    ),
    "auto-round": Packing(
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"}, gptq, 32
    ),
    "bitsandbytes nf4": Packing({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb_four_bit, 8),
    "bitsandbytes nf4 nested": Packing(
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda m: bnb_four_bit(m, nested=True), 8
    ),
    "bitsandbytes fp4": Packing(
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda m: bnb_four_bit(m, "fp4"), 8
    ),
    "bitsandbytes int8": Packing({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8, 8),
}
"""By name; `mxfp4`, which stacks experts, is `mxfp4_checkpoint`'s."""


def packed_checkpoint(folder: Path, packing: Packing) -> Path:
    """Packs the large matrices of the layers of a checkpoint of one file, in place, but routers and embeddings."""
    tensors = load_file(folder / "model.safetensors")
    made: Stored = {}
    for name, value in tensors.items():
        if _is_packed(name, value, packing.widths):
            base = name.removesuffix("weight")
            made |= {base + end: each.contiguous() for end, each in packing.pack(value.float()).items()}
        else:
            made[name] = value
    return _written(folder, made, packing.config)


def mxfp4_checkpoint(folder: Path) -> Path:
    """Packs the experts of a gpt-oss as it is published."""
    made: Stored = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            groups = value.transpose(1, 2).contiguous().float().unflatten(2, (-1, 32))
            exponents = (groups.abs().amax(-1).clamp_min(1e-30) / 6).log2().ceil()
            codes = _nearest(groups / exponents.exp2().unsqueeze(-1), torch.tensor(E2M1))
            made[f"{name}_blocks"] = _pairs(codes)
            made[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        else:
            made[name] = value
    return _written(folder, made, {"quant_method": "mxfp4"})


def _is_packed(name: str, value: torch.Tensor, widths: int) -> bool:
    kept = any(
        part in name for part in ("embed", "lm_head", "norm", "router", ".gate.weight", "shared_expert_gate", "conv")
    )
    return (
        name.endswith(".weight") and value.dim() == 2 and not kept and all(side % widths == 0 for side in value.shape)
    )


def _written(folder: Path, tensors: Stored, config: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


def widened(folder: Path, into: Path) -> Iterator[str]:
    """Writes the float checkpoint that `folder` stands for, by the plain form; yields the names of packed weights."""
    checkpoint = open_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    tensors = {name: stored[name] for name in checkpoint.tensors}
    by_place = {entry.offset: name for name, entry in read_table(folder / "model.safetensors", 0)}
    for name, weight in checkpoint.packed.items():
        raw = [stored[by_place[entry.offset]] for entry in weight.stored.values()]
        tensors[name] = weight.float(raw, torch.float32).contiguous()
        yield name
    into.mkdir(parents=True)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    for file in folder.glob("*.json"):
        config = json.loads(file.read_text())
        config.pop("quantization_config", None)
        (into / file.name).write_text(json.dumps(config))
