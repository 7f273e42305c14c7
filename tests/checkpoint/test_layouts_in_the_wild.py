"""Checkpoints as people have them: extra layers, second copies, stale indexes, scaled contexts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.support.zoo import make
from edgemoe import CheckpointError, Engine, Sampling
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.checkpoint.rope_context import context_limit
from edgemoe.demo import demo_folder
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import PROMPT, edit, greedy, reference

TOKENS = 8


def reply(folder: Path) -> list[int]:
    with Engine.load(folder, device="cpu", state_folder="none", threads=1) as engine:
        return list(engine.generate(PROMPT, Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)).token_ids)


def fresh(folder: Path, family: str, **how: Any) -> Path:
    with quiet_transformers():
        return make(family, folder, **how)


def change(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def with_extra_layer(folder: Path, family: str, **more: torch.Tensor) -> Path:
    """A checkpoint of 4 layers with a copy of the last one after it."""
    fresh(folder, family)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if ".layers.3." in key]:
        tensors[key.replace(".layers.3.", ".layers.4.")] = tensors[key].clone()
    change(file, tensors | {f"model.layers.4.{name}": value for name, value in more.items()})
    return folder


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_layers_after_the_last_are_heads_that_draft(family: str, declared: bool, tmp_path: Path) -> None:
    """huggingface/optimum-intel#1608, ml-explore/mlx-swift-lm#592: the depth is not that of the published model."""
    folder = with_extra_layer(tmp_path / "mtp", family, **{"eh_proj.weight": torch.zeros(64, 128)})
    if declared:
        edit(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=1))
    assert reply(folder) == greedy(reference(folder), PROMPT, TOKENS)


def test_a_layer_like_all_others_is_a_mistake(tmp_path: Path) -> None:
    folder = with_extra_layer(tmp_path / "cut", "qwen3_moe")
    with pytest.raises(CheckpointError, match="does not match its family"):
        open_blueprint(folder)


def test_the_index_says_which_copy_of_a_tensor_counts(tmp_path: Path) -> None:
    """JustVugg/colibri#1479, vllm-project/vllm#54230: a shard keeps a tensor that moved to another one."""
    folder = fresh(tmp_path / "twice", "qwen3_moe", max_shard_size="200KB")
    expected = reply(folder)
    owners = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    key = "lm_head.weight"
    others = sorted(set(owners.values()) - {owners[key]})
    for other in (others[0], others[-1]):
        tensors = load_file(folder / other)
        change(folder / other, tensors | {key: torch.zeros(256, 64)})
    assert reply(folder) == expected


def test_two_copies_that_no_index_tells_apart_are_refused(tmp_path: Path) -> None:
    folder = fresh(tmp_path / "loose", "mixtral")
    change(folder / "more.safetensors", {"lm_head.weight": torch.zeros(256, 64)})
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match="tensor lm_head.weight is in weights.safetensors and in more.safetensors"
    ):
        open_blueprint(folder)


def test_one_file_of_all_weights_counts_before_a_stale_index(tmp_path: Path) -> None:
    """As in transformers: weights that were merged, or quantised back, beside the index of their shards."""
    folder = fresh(tmp_path / "stale", "mixtral")
    expected = reply(folder)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert reply(folder) == expected


@pytest.mark.parametrize("name", ["consolidated.safetensors", "original/model.safetensors"])
def test_a_second_copy_in_another_format_is_left_alone(name: str, tmp_path: Path) -> None:
    folder = fresh(tmp_path / "both", "mixtral")
    expected = reply(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / name).parent.mkdir(exist_ok=True)
    change(folder / name, {"layers.0.w": torch.zeros(2, 2), "lm_head.weight": torch.zeros(256, 64)})
    assert reply(folder) == expected


def test_consolidated_weights_alone_are_named(tmp_path: Path) -> None:
    folder = fresh(tmp_path / "alone", "mixtral")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="has consolidated weights only"):
        open_blueprint(folder)


@pytest.mark.parametrize("shard", [5, None, "", ".", "../elsewhere.safetensors"])
def test_an_index_that_names_no_file_is_refused(shard: Any, tmp_path: Path) -> None:
    folder = fresh(tmp_path / "bad", "mixtral")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json cannot be read"):
        open_blueprint(folder)


class Text:
    """A text configuration with what is given."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default"}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": YARN}, 2048),
        ({"max_position_embeddings": 640, "rope_scaling": YARN}, 2048),
        ({"max_position_embeddings": 4096, "rope_parameters": YARN}, 4096),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 1024),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 8}}, 4096),
        ({"max_position_embeddings": 512, "rope_parameters": {**YARN, "rope_type": "llama3"}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {**YARN, "rope_type": "longrope"}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {"full_attention": YARN}}, 512),
    ],
)
def test_a_scaled_context_counts(fields: dict[str, Any], limit: int | None) -> None:
    """lmstudio-ai/mlx-engine#180, vllm-project/vllm#2565."""
    assert context_limit(Text(**fields)) == limit


def test_a_reply_may_be_longer_than_what_yarn_began_with(tmp_path: Path) -> None:
    folder = fresh(tmp_path / "yarn", "qwen3_moe")
    scaling = {"rope_theta": 10000.0, "rope_scaling": YARN}

    def scale(config: dict[str, Any]) -> None:
        config.pop("rope_parameters")
        config.update(scaling)

    edit(folder / "config.json", scale)
    prompt = [3 + token % 250 for token in range(700)]
    with Engine.load(folder, device="cpu", context=2048, state_folder="none", threads=1) as engine:
        found = engine.generate(prompt, Sampling(temperature=0, max_tokens=4, ignore_eos=True))
    assert list(found.token_ids) == greedy(reference(folder), prompt, 4)


@pytest.mark.parametrize("setting", [{"output_router_logits": True}, {"return_dict": False}])
def test_what_a_training_asks_a_pass_for_is_not_made(setting: dict[str, bool], tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(demo_folder(), folder)
    edit(folder / "config.json", lambda config: config.update(setting))
    assert reply(folder) == reply(demo_folder())


@pytest.mark.parametrize(
    "setting", [{"tie_word_embeddings": "yes"}, {"quantization_config": {"quant_method": "gptq", "bits": "x"}}]
)
def test_a_configuration_that_cannot_be_read_says_what_mends_it(setting: dict[str, Any], tmp_path: Path) -> None:
    folder = fresh(tmp_path / "broken", "qwen3_moe")
    edit(folder / "config.json", lambda config: config.update(setting))
    with pytest.raises(CheckpointError, match=": fetch it again$"):
        open_blueprint(folder)
