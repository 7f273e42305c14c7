"""Packed checkpoints are read as they are: tokens as transformers' on the widened weights, records with their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.exactness.native_exact import compare
from bench.support.packing import PACKINGS, mxfp4_checkpoint, packed_checkpoint
from bench.support.zoo import make
from edgemoe import CheckpointError, Engine
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.quiet import quiet_transformers


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_is_exact(packing: str, tmp_path: Path) -> None:
    with quiet_transformers():
        found = compare(tmp_path, "qwen3_moe", packing, 12, "cpu")
    assert found["same"]
    assert found["logprob"] < 1e-4
    assert found["packed"] > 100


def test_gpt_oss_is_exact(tmp_path: Path) -> None:
    with quiet_transformers():
        found = compare(tmp_path, "gpt_oss", "mxfp4", 12, "cpu")
    assert found["same"], found


def packed(folder: Path, packing: str, family: str = "qwen3_moe") -> Path:
    with quiet_transformers():
        return packed_checkpoint(make(family, folder), PACKINGS[packing])


@pytest.mark.parametrize("packing", ["fp8", "compressed int4", "awq", "bitsandbytes nf4"])
def test_a_record_has_the_bytes_of_the_file(packing: str, tmp_path: Path) -> None:
    """One contiguous run for each part, read without a conversion."""
    blueprint = open_blueprint(packed(tmp_path / "model", packing))
    weights = blueprint.checkpoint.weights
    assert all(source.assemble is None for source in blueprint.records.values())
    experts = [weight for name, weight in blueprint.checkpoint.packed.items() if ".experts." in name]
    assert sum(extent.nbytes for source in blueprint.records.values() for extent in source.extents) == sum(
        weight.nbytes for weight in experts
    )
    assert not [name for name in blueprint.dense_keys if ".experts." in name and name in weights]


def test_a_plan_counts_packed_bytes(tmp_path: Path) -> None:
    float_plan = Engine.plan_for(make("qwen3_moe", tmp_path / "float"), device="cpu", dtype="float32")
    plan = Engine.plan_for(packed(tmp_path / "packed", "compressed int4"), device="cpu", dtype="float32")
    assert plan.slot_nbytes < 0.2 * float_plan.slot_nbytes


def change(folder: Path, run: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    run(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end) and ".experts." in name)


@pytest.mark.parametrize(
    ("packing", "end", "said"),
    [
        ("compressed int4", "weight_shape", "weight_packed has"),
        ("compressed int4", "weight_scale", "weight"),
        ("gptq", "scales", "groups"),
        ("awq", "qzeros", "needs"),
        ("fp8", "weight_scale_inv", "needs"),
        ("compressed nvfp4", "weight_scale", "needs"),
        ("bitsandbytes nf4", "absmax", "needs"),
    ],
)
def test_a_part_of_another_size_is_refused_by_name(packing: str, end: str, said: str, tmp_path: Path) -> None:
    folder = packed(tmp_path / "model", packing)

    def run(tensors: dict[str, torch.Tensor]) -> None:
        name = first(tensors, end)
        if end == "weight_shape":
            tensors[name] = torch.tensor([1 << 40, 1 << 40])
        else:
            tensors[name] = torch.cat([tensors[name], tensors[name]])

    with pytest.raises(CheckpointError, match=said):
        open_blueprint(change(folder, run))


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 10**30}, {"bits": -4}, {"bits": [4]}, {"group_size": 0.5}, {"group_size": 7}, {"bits": "x"},
        {"quant_method": "awq", "version": "gemv"}, {"quant_method": "auto-round", "packing_format": "llmcompressor"},
    ],
)  # fmt: skip
def test_an_absurd_configuration_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = packed(tmp_path / "model", "gptq")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantisation|quantization_config.bits"):
        open_blueprint(folder)


def test_experts_of_a_layer_in_several_formats_are_refused(tmp_path: Path) -> None:
    """One expert's matrix is not packed like those of the others."""
    folder = packed(tmp_path / "model", "fp8")

    def run(tensors: dict[str, torch.Tensor]) -> None:
        name = next(each for each in sorted(tensors) if each.endswith("experts.3.down_proj.weight"))
        tensors[name] = tensors.pop(name).float().bfloat16()
        del tensors[f"{name}_scale_inv"]

    with pytest.raises(CheckpointError, match="in several formats"):
        open_blueprint(change(folder, run))


def test_mxfp4_in_bf16(tmp_path: Path) -> None:
    with quiet_transformers():
        folder = mxfp4_checkpoint(make("gpt_oss", tmp_path / "model"))
    with Engine.load(folder, device="cpu", dtype="bfloat16", state_folder="none") as engine:
        assert len(engine.generate([5, 6, 7]).token_ids) > 0
