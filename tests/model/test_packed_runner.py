"""Joint steps, packed or side by side, give what one sequence after the other gives, and share the experts."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch

from edgemoe.cache import Loan
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.packed_runner import PackedRunner
from edgemoe.model.sequential_runner import PassInput, SequentialRunner
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import PROMPT, Running, Zoo, random_ids, running, spread

PACKED = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "phimoe",
    "gpt_oss",
    "granitemoe_swa",
    "glm4_moe",
    "mimo_v2_flash",
    "cohere2_moe",
    "gemma4",
    "qwen3_next",
    "nemotron_h",
    "zaya",
]
"""Among them windows of 6 tokens, attention sinks, values narrower than keys, shared experts, and states."""
SIDE_BY_SIDE = [
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "kimi_linear",
    "minimax",
    "qwen4_exp_text",
    "inkling2_text",
]
"""Latents, recurrent states, indexers, compressed rows, and attention that is not transformers' own."""
ROUNDS = [[5, 12, 1, 23], [1, 9, 4, 1], [7, 1, 1, 1], [1, 1, 1, 30], [1, 1, 1, 1]]
"""Tokens of each of four sequences in each step: chunks of prompts beside single tokens, far beyond the windows."""
WHOLE_ROUNDS = [ROUNDS[0], *[[1, 1, 1, 1]] * 3]
"""For families that extend what they have by one token only."""


def assert_steps_equal_the_reference(own: Running, rounds: Sequence[Sequence[int]], dtype_tolerance: float) -> None:
    """Runs `rounds` jointly and one by one, the pasts changing sides after every step."""
    runner = own.runner()
    joint = ModelRunner(runner)
    one, other = ([runner.start(8) for _ in rounds[0]] for _ in range(2))
    for number, counts in enumerate(rounds):
        tokens = [random_ids(count, seed=100 * number + place) for place, count in enumerate(counts)]
        expected = runner.run(works(one, tokens))
        found = joint.run(works(other, tokens))
        assert [cache.tokens for cache in other] == [cache.tokens for cache in one]
        for correct, logits in zip(expected, found, strict=True):
            assert logits.shape == correct.shape
            assert (logits.dtype, logits.device.type, logits.requires_grad) == (torch.float32, "cpu", False)
            assert (logits - correct).abs().max() <= dtype_tolerance * spread(correct)
        one, other = other, one


def works(caches: Sequence[SequenceCache], tokens: Sequence[Sequence[int]]) -> list[PassInput]:
    return [PassInput(cache, each) for cache, each in zip(caches, tokens, strict=True)]


def packs(runner: SequentialRunner) -> bool:
    return PackedRunner(runner).works


@pytest.mark.parametrize("family", PACKED)
def test_a_packed_step_equals_one_after_the_other(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        assert packs(own.runner())
        assert_steps_equal_the_reference(own, ROUNDS, 1e-4)


@pytest.mark.parametrize("family", SIDE_BY_SIDE)
def test_a_step_side_by_side_equals_one_after_the_other(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        assert not packs(own.runner())
        assert_steps_equal_the_reference(own, ROUNDS, 1e-4)


def test_what_cannot_be_run_in_chunks_is_stepped_jointly_in_whole_prompts(zoo: Zoo) -> None:
    with running(zoo("jamba")) as own, quiet_transformers():
        assert packs(own.runner())
        assert_steps_equal_the_reference(own, WHOLE_ROUNDS, 1e-4)


@pytest.mark.parametrize(
    ("family", "packed"), [("mixtral", True), ("gpt_oss", True), ("nemotron_h", True), ("kimi_linear", False)]
)
def test_in_bfloat16_joint_steps_differ_by_rounding_only(family: str, packed: bool, zoo: Zoo) -> None:
    with running(zoo(family), dtype="bfloat16") as own, quiet_transformers():
        assert packs(own.runner()) is packed
        assert_steps_equal_the_reference(own, ROUNDS, 0.1)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_sequence_are_not_packed(kind: str, zoo: Zoo) -> None:
    """One long sequence would change what its companions get."""
    scales: dict[str, Any] = {"short_factor": [1.0] * 8, "long_factor": [1.0 + place / 8 for place in range(8)]}
    scales |= {"short_mscale": 1.0, "long_mscale": 1.2}
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= scales if kind == "longrope" else {"factor": 2.0}
    folder = zoo("phimoe" if kind == "longrope" else "mixtral", rope_parameters=rope)
    with running(folder) as own, quiet_transformers():
        assert not packs(own.runner())
        assert_steps_equal_the_reference(own, ROUNDS, 1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next", "deepseek_v3"])
def test_every_layer_acquires_its_experts_once_a_step(family: str, zoo: Zoo) -> None:
    with running(zoo(family), slots=10) as own, quiet_transformers():
        runner = own.runner()
        joint = ModelRunner(runner)
        caches = [runner.start(8) for _ in range(5)]
        joint.run(works(caches, [random_ids(3, seed) for seed in range(5)]))
        asked: list[int] = []
        borrow = own.cache.borrow

        def counting(layer: int, experts: Sequence[int], **more: Any) -> Generator[Loan, None, None]:
            asked.append(layer)
            assert len(set(experts)) == len(experts)
            return borrow(layer, experts, **more)

        own.cache.borrow = counting  # type: ignore[method-assign, assignment]
        for tokens in ([[9]] * 5, [[9], [8, 7, 6, 5], [1], [2], [3, 3]]):
            asked.clear()
            joint.run(works(caches, tokens))
            assert asked == list(range(len(own.blueprint.experts_modules)))
        own.cache.check_integrity()


def implementations(model: Any) -> list[Any]:
    """What every module's configuration says about attention."""
    return [
        module.config._attn_implementation for module in model.modules() if getattr(module, "config", None) is not None
    ]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gemma4", "qwen3_5_moe"])
def test_packing_leaves_no_trace_in_the_configuration(family: str, zoo: Zoo) -> None:
    with running(zoo(family)) as own, quiet_transformers():
        before = implementations(own.model)
        alone = own.logits(PROMPT)
        runner = own.runner()
        joint = ModelRunner(runner)
        assert implementations(own.model) == before
        joint.run(works([runner.start(8), runner.start(8)], [[5, 6], [7]]))
        assert implementations(own.model) == before
        assert torch.equal(own.logits(PROMPT), alone)


def test_an_error_leaves_no_trace_either(zoo: Zoo) -> None:
    """In the middle of a packed pass: a token that no embedding has, and an attention that fails."""
    with running(zoo("mixtral")) as own, quiet_transformers():
        runner = own.runner()
        packed = PackedRunner(runner)
        assert packed.works
        before = implementations(own.model)
        alone = own.logits(PROMPT)
        with pytest.raises(IndexError):
            packed.run(works([runner.start(8), runner.start(8)], [[5, 6], [10**6]]))
        broken = runner.start(8)
        broken.kv.layers[2].update = None
        with pytest.raises(TypeError):
            packed.run(works([runner.start(8), broken], [[5, 6], [7]]))
        assert implementations(own.model) == before
        assert packed.attention is not None
        assert packed.attention.rows == ()
        assert packed.attention._masks == {}
        assert torch.equal(own.logits(PROMPT), alone)
        assert_steps_equal_the_reference(own, ROUNDS[:2], 1e-4)


def test_two_packed_models_live_side_by_side(zoo: Zoo) -> None:
    """They share transformers' registry, and nothing else: steps of both in turns."""
    with running(zoo("mixtral")) as one, running(zoo("gpt_oss")) as other, quiet_transformers():
        assert_steps_equal_the_reference(one, ROUNDS[:2], 1e-4)
        assert_steps_equal_the_reference(other, ROUNDS[:2], 1e-4)
        sides = []
        for own in (one, other):
            runner = own.runner()
            assert packs(runner)
            alone, together = ([runner.start(8) for _ in range(2)] for _ in range(2))
            sides.append((runner, ModelRunner(runner), alone, together))
        for counts in ROUNDS[:3]:
            tokens = [random_ids(count) for count in counts[:2]]
            for runner, joint, alone, together in sides:
                expected, found = runner.run(works(alone, tokens)), joint.run(works(together, tokens))
                for correct, logits in zip(expected, found, strict=True):
                    assert (logits - correct).abs().max() <= 1e-4 * spread(correct)


def test_companions_change_nothing(zoo: Zoo) -> None:
    """The same sequence beside others gets the same logits to rounding, wherever in the row it stands."""
    with running(zoo("gpt_oss")) as own, quiet_transformers():
        runner = own.runner()
        joint = ModelRunner(runner)
        expected = runner.run([PassInput(runner.start(8), PROMPT)])[0]
        for place in range(3):
            tokens = [random_ids(40), random_ids(2)]
            tokens.insert(place, PROMPT)
            found = joint.run(works([runner.start(8) for _ in tokens], tokens))[place]
            assert (found - expected).abs().max() <= 1e-4 * spread(expected)


def test_whether_it_can_be_packed_is_tried_without_loading_an_expert(zoo: Zoo) -> None:
    with running(zoo("mixtral"), slots=4) as own:
        assert packs(own.runner())
        assert own.cache.counters.hits + own.cache.counters.misses == 0
