from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from bench.support import zoo
from edgemoe.kernels.triton.activations import WHOLE, GateRule, gate_rule, plain_activation


def experts_of(family: str, **overrides: Any) -> Any:
    """The first experts module of a model without weights."""
    import transformers

    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(zoo.config(family, **overrides))
    return next(each for each in model.modules() if hasattr(each, "_apply_gate") and hasattr(each, "down_proj"))


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("qwen3_moe", GateRule("silu", True)),
        ("mixtral", GateRule("silu", True)),
        ("deepseek_v2", GateRule("silu", True)),
        ("gpt_oss", GateRule("swiglu", True, True, (1.702, 7.0))),
        ("nemotron_h", GateRule("relu2", False)),
        ("minimax_m3_vl_text", GateRule("swiglu", True, False, (1.702, 7.0))),
        ("gemma4_text", GateRule("gelu_pytorch_tanh", True)),
    ],
)
def test_the_activation_of_a_family(family: str, rule: GateRule) -> None:
    assert gate_rule(experts_of(family)) == rule


def test_an_activation_that_is_configured() -> None:
    for name, found in (("gelu", "gelu"), ("relu", "relu"), ("relu2", "relu2"), ("gelu_pytorch_tanh", None)):
        assert gate_rule(experts_of("qwen3_moe", hidden_act=name)) == GateRule(found or name, True)
    assert gate_rule(experts_of("qwen3_moe", hidden_act="quick_gelu")) is None


def module(gate: Any, **constants: float) -> Any:
    return SimpleNamespace(has_gate=True, _apply_gate=gate, act_fn=nn.SiLU(), **constants)


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_gate_is_recognised(interleaved: bool) -> None:
    for name in WHOLE:
        constants = {"swiglu": (1.5, 3.0), "wide_silu": ()}.get(name, (3.0,))
        rule = GateRule(name, True, interleaved, constants)
        own = module(lambda values, rule=rule: plain_activation(rule, values), alpha=1.5, limit=3.0)
        assert gate_rule(own) == rule


def test_other_gates_are_not() -> None:
    def up_first(values: torch.Tensor) -> torch.Tensor:
        up, gate = values.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    assert gate_rule(module(up_first)) is None
    assert gate_rule(module(lambda values: plain_activation(GateRule("silu", True), values) + 0.01)) is None
    assert gate_rule(module(lambda values: values)) is None
