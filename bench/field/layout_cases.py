"""Checkpoints as they are published: more tensors than a model has, copies, indexes that are wrong, long contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.field.case import Case, edit, holds, reference, reply, same, tiny, weights
from edgemoe import CheckpointError


def _as_transformers(folder: Path, **load: Any) -> str:
    return same(reply(folder, **load), reference(folder))


def _head_after_the_last(folder: Path) -> str:
    tiny(folder, "deepseek_v3")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.3." in name]:
            tensors[name.replace(".layers.3.", ".layers.4.")] = tensors[name].clone()
        tensors["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128)

    right = reference(folder)
    weights(folder, change)
    edit(folder / "config.json", num_nextn_predict_layers=1)
    return same(reply(folder), right)


def _superseded_copy(folder: Path) -> str:
    tiny(folder, max_shard_size="200KB")
    right = reply(folder)
    owners = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(name for name in sorted(set(owners.values())) if name != owners["lm_head.weight"])
    tensors = load_file(folder / other)
    tensors["lm_head.weight"] = torch.zeros(256, 64)
    save_file(tensors, folder / other, metadata={"format": "pt"})
    return same(reply(folder), right)


def _yarn(folder: Path) -> str:
    tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_theta"] = 10000.0
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    return _as_transformers(folder, context=2048)


def _undeclared_head(folder: Path) -> str:
    """As above where the configuration says that there is none."""
    tiny(folder, "deepseek_v3")
    right = reference(folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.3." in name]:
            tensors[name.replace(".layers.3.", ".layers.4.")] = tensors[name].clone()
        tensors["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128)
        tensors["model.layers.4.enorm.weight"] = torch.ones(64)

    weights(folder, change)
    edit(folder / "config.json", num_nextn_predict_layers=0)
    return same(reply(folder), right)


def _shard_that_is_not_there(folder: Path) -> str:
    tiny(folder, max_shard_size="200KB")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    try:
        reply(folder)
    except CheckpointError as error:
        return holds(str(error), lost.name)
    return "loaded without a shard"


def _tied_head_left_out(folder: Path) -> str:
    tiny(folder, tie_word_embeddings=True)
    return _as_transformers(folder)


def _head_left_out_and_not_tied(folder: Path) -> str:
    tiny(folder)
    weights(folder, lambda tensors: tensors.__delitem__("lm_head.weight"))
    try:
        reply(folder)
    except CheckpointError as error:
        return holds(str(error), "lm_head")
    return "loaded without a head"


def _no_metadata(folder: Path) -> str:
    tiny(folder)
    right = reply(folder)
    tensors = load_file(folder / "model.safetensors")
    for metadata in (None, {}, {"format": "mlx"}):
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        said = same(reply(folder), right)
        if said:
            return f"{metadata}: {said}"
    return ""


def _long_rope(folder: Path) -> str:
    """The long factors begin behind the original length."""
    tiny(folder, "phimoe")
    config = json.loads((folder / "config.json").read_text())
    heads = config["hidden_size"] // config["num_attention_heads"]
    config.pop("rope_parameters", None)
    config["rope_theta"] = 10000.0
    config |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config["rope_scaling"] = {
        "rope_type": "longrope",
        "short_factor": [1.0] * (heads // 2),
        "long_factor": [4.0] * (heads // 2),
        "short_mscale": 1.0,
        "long_mscale": 1.2,
        "original_max_position_embeddings": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for length in (15, 16, 17, 24):
        prompt = [5 + number % 90 for number in range(length)]
        said = same(reply(folder, prompt, 1), reference(folder, prompt, 1))
        if said:
            return f"{length} tokens: {said}"
    return ""


def _stray_file_beside_the_index(folder: Path) -> str:
    """Another build's weights, with wrong shapes, under a name that the index does not have."""
    tiny(folder, max_shard_size="200KB")
    right = reply(folder)
    save_file({"lm_head.weight": torch.zeros(3, 3)}, folder / "extra.safetensors", metadata={"format": "pt"})
    return same(reply(folder), right)


def _buffers_in_the_file(folder: Path) -> str:
    tiny(folder)
    right = reply(folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((8,), 7.0)

    weights(folder, change)
    return same(reply(folder), right)


def _norms_in_float32(folder: Path) -> str:
    tiny(folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            tensors[name] = value if "norm" in name else value.bfloat16()

    weights(folder, change)
    edit(folder / "config.json", dtype="bfloat16")
    return _as_transformers(folder)


CASES = [
    Case("huggingface/optimum-intel#1608, ml-explore/mlx-swift-lm#592", "a head after the last", _head_after_the_last),
    Case("vllm-project/vllm#34888", "a head that the configuration denies", _undeclared_head),
    Case("colibri/colibri#1479, vllm-project/vllm#54230", "a superseded copy of a tensor", _superseded_copy),
    Case("lmstudio-ai/mlx-engine#180, vllm-project/vllm#2565", "YaRN's context", _yarn),
    Case("sgl-project/sglang#32279", "a shard that is not there", _shard_that_is_not_there),
    Case("vllm-project/vllm#53019", "a tied head that is left out", _tied_head_left_out),
    Case("vllm-project/vllm#53019", "a head that is left out and not tied", _head_left_out_and_not_tied),
    Case("ml-explore/mlx#743", "safetensors without metadata", _no_metadata),
    Case("unslothai/unsloth#10681", "long factors behind the original length", _long_rope),
    Case("Blaizzy/mlx-vlm#1464", "a stray file beside the index", _stray_file_beside_the_index),
    Case("baaivision/Emu3#62", "buffers in the file", _buffers_in_the_file),
    Case("deepseek-ai/DeepSeek-V3#1002", "norms in float32 beside bf16", _norms_in_float32),
]
