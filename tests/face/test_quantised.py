from __future__ import annotations

from typing import Any

import pytest

from edgemoe import Engine, Sampling
from edgemoe.errors import CheckpointError, RequestError
from edgemoe.kernels.packed_layers import PackedLinear
from edgemoe.measure.evaluation import evaluate
from edgemoe.results import chat_completion
from tests.support.checkpoints import Zoo

GREEDY = Sampling(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.mark.parametrize(("experts", "dense"), [("nf4", "native"), ("native", "int8"), ("int4", "nf4")])
def test_quantised_weights_are_named_wherever_lossy_settings_are(experts: str, dense: str, zoo: Zoo) -> None:
    with Engine.load(zoo("qwen3_moe"), experts=experts, dense=dense, state_folder="none") as engine:
        plan, reply = engine.plan, engine.generate([5, 60, 70], GREEDY)
    words = [f"experts quantised to {experts}"] * (experts != "native")
    words += [f"other matrices quantised to {dense}"] * (dense != "native")
    assert all(each in plan.lossy for each in words)
    assert reply.lossy == plan.lossy
    assert chat_completion(reply, "m")["lossy"] == plan.lossy
    assert ("lossy", "yes", plan.lossy) in plan.lines()
    assert plan.to_dict()["quantised"] == plan.quantised != ""


def test_an_exact_reply_says_nothing_of_loss(zoo: Zoo) -> None:
    with Engine.load(zoo("qwen3_moe"), state_folder="none") as engine:
        reply = engine.generate([5, 60, 70], GREEDY)
    assert reply.lossy == ""
    assert "lossy" not in chat_completion(reply, "m")


def test_quantised_experts_take_fewer_bytes_and_dense_layers_too(zoo: Zoo) -> None:
    native = Engine.plan_for(zoo("qwen3_moe"))
    packed = Engine.plan_for(zoo("qwen3_moe"), experts="nf4", dense="int8")
    assert packed.slot_nbytes < 0.4 * native.slot_nbytes
    assert packed.dense_nbytes < native.dense_nbytes
    sizes = dict(native.other_formats)
    assert sizes["nf4"] == packed.record_nbytes * packed.experts
    assert packed.other_formats == ()


def test_a_plan_with_missing_experts_says_what_other_formats_would_take(zoo: Zoo) -> None:
    lines = Engine.plan_for(zoo("qwen3_moe"), expert_cache="30%").lines()
    assert any(name == "other formats" and "as nf4" in where for name, _, where in lines)
    lines = Engine.plan_for(zoo("qwen3_moe"), expert_cache="100%").lines()
    assert not any(name == "other formats" for name, _, _ in lines)


def test_small_and_routing_matrices_stay_as_they_are(zoo: Zoo) -> None:
    with Engine.load(zoo("qwen3_moe"), dense="nf4", state_folder="none") as engine:
        assert engine._runtime is not None
        names = [name for name, each in engine._runtime.model.named_modules() if isinstance(each, PackedLinear)]
    assert names
    assert not [name for name in names if name.endswith("gate") or "lm_head" in name]


@pytest.mark.parametrize("setting", ["experts", "dense"])
def test_an_unknown_format_is_refused(setting: str, zoo: Zoo) -> None:
    settings: dict[str, Any] = {setting: "int3"}
    with pytest.raises(CheckpointError, match=f"choose one as {setting}="):
        Engine.plan_for(zoo("qwen3_moe"), **settings)


def test_a_quantised_engine_is_not_compared_with_itself(zoo: Zoo) -> None:
    with (
        Engine.load(zoo("qwen3_moe"), experts="nf4", state_folder="none") as engine,
        pytest.raises(RequestError, match="experts='native'"),
    ):
        evaluate(engine, [[5, 60, 70, 80, 9]])


def test_the_command_compares_quantised_experts_with_native_ones(capfd: pytest.CaptureFixture[str]) -> None:
    from edgemoe.cli.main import main

    code = main(["eval", "--experts", "nf4", "--tokens", "200", "--questions", "0", "--state-folder", "none"])
    out = capfd.readouterr().out
    assert code == 0
    assert "lossy: experts quantised to nf4" in out
    assert "exact" in out
