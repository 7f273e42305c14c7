"""Every family gives transformers' own tokens and logits, with a cache that holds a part of the experts."""

from __future__ import annotations

import pytest
import torch

from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import DEVICES, PROMPT, Zoo, greedy, reference, running

TOKENS = 24
FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "glm4_moe",
    "ernie4_5_moe",
    "minimax",
    "phimoe",
    "nemotron_h",
    "qwen3_next",
    "jamba",
    "dots1",
    "qwen3_5_moe",
    "zaya",
    "inkling2_text",
    "gemma4",
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_equal_those_of_transformers(family: str, device: str, zoo: Zoo) -> None:
    folder = zoo(family)
    model = reference(folder, device=device)
    expected = greedy(model, PROMPT, TOKENS)
    plan = Engine.plan_for(folder, device=device)
    enough = plan.layers * (plan.top_k + 2)
    for slots in (enough, enough // 2):
        with Engine.load(folder, device=device, expert_cache=slots, threads=1) as engine:
            completion = engine.generate(PROMPT, Sampling(max_tokens=TOKENS))
            stats = engine.stats
        assert list(completion.token_ids) == expected
        assert stats.slots == min(slots, plan.experts)
        assert stats.hits + stats.misses > 0
    if device == "cpu":
        with quiet_transformers(), torch.inference_mode():
            logits = model(torch.tensor([PROMPT])).logits[0]
        with running(folder, enough // 2) as own:
            assert (own.logits(PROMPT) - logits).abs().max() <= 1e-4
            own.cache.check_integrity()
            assert len(own.cache.residents(0)) < own.blueprint.experts_modules[0].experts or enough // 2 >= plan.experts


def test_the_families_are_different_kinds(zoo: Zoo) -> None:
    """What makes them worth testing: no gate, biases, transposed weights, and layers without experts."""
    kinds = {}
    for family in ("mixtral", "nemotron_h", "gpt_oss", "deepseek_v3"):
        with running(zoo(family)) as own:
            modules = [moe.module(own.model) for moe in own.blueprint.experts_modules]
            kinds[family] = (modules[0].has_gate, modules[0].has_bias, modules[0].is_transposed, len(modules))
    assert kinds == {
        "mixtral": (True, False, False, 4),
        "nemotron_h": (False, False, False, 3),
        "gpt_oss": (True, True, True, 4),
        "deepseek_v3": (True, False, False, 3),
    }
