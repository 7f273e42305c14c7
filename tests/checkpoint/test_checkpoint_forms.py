"""Every form of a checkpoint gives the same weights: sharded or not, stacked or one by one, in any dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgemoe import Engine, Sampling
from edgemoe.cache import ExpertId
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import PROMPT, Running, Zoo, greedy, reference, running

TOKENS = 16


def generated(folder: Path, dtype: str = "auto") -> list[int]:
    plan = Engine.plan_for(folder)
    with Engine.load(folder, dtype=dtype, expert_cache=plan.layers * (plan.top_k + 1), threads=1) as engine:
        return list(engine.generate(PROMPT, Sampling(max_tokens=TOKENS)).token_ids)


def record(own: Running, layer: int, number: int) -> dict[str, torch.Tensor]:
    """The parts of one expert, as read by the store."""
    expert = ExpertId(layer, number)
    slot = torch.zeros(own.store.slot_nbytes, dtype=torch.uint8)
    for _, move in own.store.pieces(expert, slot):
        move()
    return own.blueprint.experts_modules[layer].layout.views(slot)


def parameters(own: Running, model: torch.nn.Module, layer: int, number: int) -> dict[str, torch.Tensor]:
    """The same parts in the model loaded by transformers."""
    moe = own.blueprint.experts_modules[layer]
    return {part.name: getattr(moe.module(model), part.name)[number] for part in moe.layout.parts}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_sharded_equals_single(family: str, zoo: Zoo) -> None:
    single, sharded = zoo(family), zoo(family, max_shard_size="64KB")
    assert len(list(single.glob("*.safetensors"))) == 1
    assert len(list(sharded.glob("*.safetensors"))) > 10
    assert generated(sharded) == generated(single)


def test_an_experts_tensors_may_lie_in_different_files(zoo: Zoo) -> None:
    with running(zoo("qwen3_moe", max_shard_size="64KB")) as own:
        files = {extent.file for extent in own.blueprint.records[ExpertId(0, 0)].extents}
        model = reference(zoo("qwen3_moe"))
        assert len(files) > 1
        for name, value in record(own, 0, 0).items():
            assert torch.equal(value, parameters(own, model, 0, 0)[name])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "nemotron_h", "deepseek_v3"])
def test_stacked_equals_one_by_one(family: str, zoo: Zoo, tmp_path: Path) -> None:
    """transformers saves either one tensor per expert, or all experts of a layer in one tensor."""
    apart = zoo(family)
    with quiet_transformers():
        reference(apart).save_pretrained(tmp_path, save_original_format=False)
    assert any(key.endswith("experts.down_proj") for key in load_file(tmp_path / "model.safetensors"))
    assert not any(key.endswith("experts.down_proj") for key in load_file(apart / "model.safetensors"))
    with running(apart) as one, running(tmp_path) as other:
        for layer, moe in enumerate(one.blueprint.experts_modules):
            for number in range(moe.experts):
                expected, found = record(one, layer, number), record(other, layer, number)
                assert expected.keys() == found.keys()
                assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert generated(tmp_path) == generated(apart)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "inkling2_text", "jamba"])
@pytest.mark.parametrize(("stored", "used"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_records_are_transformers_parameters_bit_for_bit(family: str, stored: str, used: str, zoo: Zoo) -> None:
    folder = zoo(family, dtype=getattr(torch, stored))
    with running(folder, dtype=used) as own:
        model = reference(folder, getattr(torch, used))
        for layer, number in (
            (0, 0),
            (len(own.blueprint.experts_modules) - 1, own.blueprint.experts_modules[-1].experts - 1),
        ):
            expected, found = parameters(own, model, layer, number), record(own, layer, number)
            assert all(value.dtype is expected[name].dtype for name, value in found.items())
            assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h", "gpt_oss"])
def test_a_bf16_checkpoint_runs_in_float32(family: str, zoo: Zoo) -> None:
    folder = zoo(family, dtype=torch.bfloat16)
    assert generated(folder, "float32") == greedy(reference(folder), PROMPT, TOKENS)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_in_bfloat16_the_reference_arithmetic_is_transformers_own(family: str, stored: torch.dtype, zoo: Zoo) -> None:
    folder = zoo(family, dtype=stored)
    model = reference(folder, torch.bfloat16)
    with running(folder, dtype="bfloat16", plain=True) as own:
        assert own.model.dtype is torch.bfloat16
        with torch.inference_mode():
            assert torch.equal(own.logits(PROMPT), model(torch.tensor([PROMPT])).logits[0].float())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_auto_takes_the_dtype_in_which_the_weights_are_stored(stored: str, zoo: Zoo) -> None:
    folder = zoo("mixtral", dtype=getattr(torch, stored))
    assert Engine.plan_for(folder).dtype == stored
    assert Engine.plan_for(folder, dtype="float32").dtype == "float32"
    assert len(generated(folder)) == TOKENS


def test_dense_weights_are_transformers_own(zoo: Zoo) -> None:
    """With those that a bf16 model keeps in float32, and tied ones."""
    for family in ("deepseek_v3", "ernie4_5_moe", "gemma4"):
        folder = zoo(family, dtype=torch.bfloat16)
        model = reference(folder, torch.bfloat16)
        with running(folder) as own:
            experts = {f"{moe.name}.{part.name}" for moe in own.blueprint.experts_modules for part in moe.layout.parts}
            expected = {name: value for name, value in model.state_dict().items() if name not in experts}
            found = own.model.state_dict()
            assert found.keys() == expected.keys()
            assert all(value.dtype is expected[name].dtype for name, value in found.items())
            assert all(torch.equal(value, expected[name]) for name, value in found.items())
            buffers = dict(own.model.named_buffers())
            assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
