"""Checkpoints that do not fit their family, and families that do not fit edgemoe, are refused before loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.support.zoo import REFUSED
from edgemoe import CheckpointError, Engine
from tests.support.checkpoints import Zoo, edit

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w2.weight"


@pytest.fixture
def folder(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of a valid mixtral, for the test to damage."""
    return Path(shutil.copytree(zoo("mixtral"), tmp_path / "model"))


def damage(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        Engine.plan_for(folder, **options)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    with pytest.raises(CheckpointError):
        Engine.load(folder, **options)


@pytest.mark.parametrize("key", ["model.norm.weight", "lm_head.weight", "model.layers.2.self_attn.q_proj.weight"])
def test_a_missing_weight(folder: Path, key: str) -> None:
    damage(folder, lambda tensors: tensors.pop(key))
    refusal(folder, str(folder), "does not match its family mixtral", f"lacks {key}", "fetch it again")


@pytest.mark.parametrize("key", [EXPERT, EXPERT.replace("w2", "w1"), EXPERT.replace("w2", "w3")])
def test_a_missing_expert_weight(folder: Path, key: str) -> None:
    damage(folder, lambda tensors: tensors.pop(key))
    refusal(folder, str(folder), "layers.1.mlp.experts", "fetch it again")


def test_a_layer_without_experts(folder: Path) -> None:
    def remove(tensors: Tensors) -> None:
        for key in [key for key in tensors if "layers.3.block_sparse_moe.experts" in key]:
            del tensors[key]

    damage(folder, remove)
    refusal(folder, "lacks model.layers.3.mlp.experts.down_proj and 1 more", "fetch it again")


@pytest.mark.parametrize("key", ["model.layers.9.input_layernorm.weight", "model.extra.weight"])
def test_a_surplus_weight(folder: Path, key: str) -> None:
    damage(folder, lambda tensors: tensors.update({key: torch.ones(4)}))
    refusal(folder, "does not match its family mixtral", f"has the unknown tensor {key}", "fetch it again")


def test_a_surplus_expert(folder: Path) -> None:
    damage(folder, lambda tensors: tensors.update({EXPERT.replace("experts.5", "experts.8"): tensors[EXPERT].clone()}))
    refusal(folder, str(folder), "layers.1.mlp.experts", "fetch it again")


def test_a_layer_beyond_the_last(folder: Path) -> None:
    damage(folder, lambda tensors: tensors.update({EXPERT.replace("layers.1", "layers.7"): tensors[EXPERT].clone()}))
    refusal(folder, "has the unknown tensor", "layers.7", "fetch it again")


@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_misshapen_weight(folder: Path, key: str) -> None:
    shape = list(load_file(folder / "model.safetensors")[key].shape)
    wrong = [shape[0] + 2, *shape[1:]]
    damage(folder, lambda tensors: tensors.update({key: torch.ones(wrong)}))
    refusal(folder, "does not match its configuration", f"{key} is {wrong} and should be {shape}", "fetch it again")


@pytest.mark.parametrize("numbers", [[5], range(8)], ids=["one", "all"])
def test_misshapen_experts(folder: Path, numbers: list[int]) -> None:
    keys = [EXPERT.replace("experts.5", f"experts.{number}") for number in numbers]
    damage(folder, lambda tensors: tensors.update({key: torch.ones(64, 94) for key in keys}))
    refusal(folder, str(folder), "layers.1.mlp.experts.down_proj", "fetch it again")


def test_a_configuration_with_other_sizes_than_the_weights(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(num_local_experts=16))
    refusal(folder, str(folder), "mlp.experts", "fetch it again")


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_whose_experts_do_not_fit(family: str, zoo: Zoo) -> None:
    refusal(zoo(family), f"family {family}", "transformers does not dispatch", "edgemoe cannot run it")


def dense_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(folder)
    return folder


def test_a_model_without_experts(tmp_path: Path) -> None:
    refusal(
        dense_llama(tmp_path), "is not a Mixture-of-Experts model (llama without experts)", "run it with transformers"
    )


def test_a_model_that_generates_no_text(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refusal(folder, "is of the family vit, which is no causal language model")


def test_a_family_that_transformers_does_not_have(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(model_type="wondermoe"))
    refusal(folder, "is of the family wondermoe, unknown to this transformers", "upgrade it")


def test_code_from_the_folder_is_never_run(folder: Path) -> None:
    code = folder / "modeling_wonder.py"
    ran = folder / "ran"
    code.write_text(f"open({str(ran)!r}, 'w')\nclass WonderConfig: ...\nclass WonderForCausalLM: ...\n")
    auto = {"AutoConfig": "modeling_wonder.WonderConfig", "AutoModelForCausalLM": "modeling_wonder.WonderForCausalLM"}
    edit(folder / "config.json", lambda config: config.update(model_type="wondermoe", auto_map=auto))
    refusal(folder, "(wondermoe) needs code from its own folder, which edgemoe never runs", "use a family that")
    edit(folder / "config.json", lambda config: config.update(model_type="mixtral"))
    assert Engine.plan_for(folder).family == "mixtral", "a family that transformers has needs no code"
    assert not ran.exists()


def test_a_configuration_that_its_family_refuses(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(hidden_size="wide"))
    refusal(folder, "config.json: hidden_size is 'wide'", "an integer from 1")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.uint8])
def test_weights_in_an_unsupported_dtype(folder: Path, dtype: torch.dtype) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    damage(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype).repeat(1, 1)}))
    refusal(folder, f"{key} is stored as {dtype}", "only bf16, fp16 and fp32 weights are supported")


def test_files_without_weights(folder: Path) -> None:
    save_file({"table": torch.ones(4, dtype=torch.int64)}, folder / "model.safetensors")
    refusal(folder, str(folder), "has no floating-point weights", "fetch it again")


def test_a_table_of_integers_is_no_quantised_weight(zoo: Zoo) -> None:
    """deepseek_v4 routes some layers by a table of token ids; 600 × 2 of 8 bytes here, megabytes in a real one."""
    assert Engine.plan_for(zoo("deepseek_v4", vocab_size=600)).family == "deepseek_v4"


def test_an_unknown_dtype_of_the_computation(folder: Path) -> None:
    refusal(folder, "dtype 'int8' is not one of auto, bfloat16, float16, float32", "as dtype=", dtype="int8")


def test_a_tokenizer_that_cannot_be_loaded(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be loaded .*remove its files"):
        Engine.load(folder, expert_cache=4)


def test_a_tokenizer_whose_vocabulary_is_missing(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match=r"its folder has no tokenizer\.json or tokenizer\.model\): fetch it"):
        Engine.load(folder, expert_cache=4)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_generation_settings_that_cannot_be_read(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Engine.load(folder, expert_cache=4)


@pytest.mark.parametrize("loader", ["MixtralConfig", "AutoTokenizer", "GenerationConfig"])
def test_running_out_of_memory_is_not_blamed_on_the_checkpoint(
    talker: Path, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*of: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", fail)
    with pytest.raises(MemoryError):
        Engine.load(talker, expert_cache=4)


def test_published_tensors_that_the_family_ignores_are_no_surplus(zoo: Zoo, tmp_path: Path) -> None:
    """The multi-token-prediction layers, which transformers' own class ignores too."""
    folder = Path(shutil.copytree(zoo("qwen3_next"), tmp_path / "model"))
    keys = [f"mtp.layers.0.mlp.experts.{number}.down_proj.weight" for number in range(8)]
    damage(folder, lambda tensors: tensors.update({key: torch.ones(64, 32) for key in keys}))
    assert Engine.plan_for(folder).layers == Engine.plan_for(zoo("qwen3_next")).layers
