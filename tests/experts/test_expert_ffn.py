"""The experts' arithmetic: kernels against the reference, and both against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgemoe.experts.expert_ffn import FastExperts, PlainExperts, TokenGroups
from edgemoe.experts.prepared_experts import PreparedExperts
from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS
from tests.support.checkpoints import Zoo, reference, running

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
"""Largest difference from float64, relative to the largest output."""


def choices(tokens: int, experts: int, top_k: int, width: int, dtype: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(getattr(torch, dtype))
    index = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return hidden, index, torch.rand(tokens, top_k, generator=generator)


def exact(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the chosen experts in float64, from transformers' stacked weights and gate."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"

    def linear(x: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight = getattr(module, name)[expert].double()
        product: torch.Tensor = x @ (weight if module.is_transposed else weight.t())
        return product + getattr(module, f"{name}_bias")[expert].double() if module.has_bias else product

    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, row in enumerate(index.tolist()):
        for place, expert in enumerate(row):
            inner = linear(hidden[token : token + 1].double(), up_name, expert)
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            out[token] += weights[token, place].double() * linear(inner, "down_proj", expert)[0]
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "gpt_oss", "deepseek_v4"])
def test_kernels_and_reference_agree_with_float64(family: str, dtype: str, zoo: Zoo) -> None:
    folder = zoo(family)
    stacked = reference(folder, getattr(torch, dtype))
    with running(folder, dtype=dtype) as fast, running(folder, slots=3, dtype=dtype, plain=True) as plain:
        moe = fast.blueprint.experts_modules[-1]
        module = moe.module(stacked)
        width = next(part.shape for part in moe.layout.parts if part.name == "down_proj")
        for tokens in (1, 2, 3, 20):
            inputs = choices(tokens, moe.experts, 3, width[1 if module.is_transposed else 0], dtype)
            truth = exact(module, *inputs)
            with torch.inference_mode():
                outputs = [moe.module(own.model).forward(*inputs) for own in (fast, plain)]
            for output in outputs:
                assert output.dtype is inputs[0].dtype
                assert output.shape == inputs[0].shape
                assert (output.double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()


def test_kernels_take_every_layout_but_the_named_ones(zoo: Zoo) -> None:
    fits = {}
    for family, dtype in (
        ("mixtral", "float32"),
        ("mixtral", "bfloat16"),
        ("gpt_oss", "bfloat16"),
        ("gpt_oss", "float16"),
    ):
        with running(zoo(family), dtype=dtype) as own:
            moe = own.blueprint.experts_modules[0]
            fits[family, dtype] = FastExperts.fits(moe)
    assert fits == {
        ("mixtral", "float32"): True,
        ("mixtral", "bfloat16"): True,
        ("gpt_oss", "bfloat16"): True,
        ("gpt_oss", "float16"): False,
    }


@pytest.mark.parametrize("plain", [False, True])
def test_a_token_has_the_same_result_alone_and_among_others(plain: bool, zoo: Zoo) -> None:
    with running(zoo("mixtral"), plain=plain) as own:
        moe = own.blueprint.experts_modules[0]
        hidden, index, weights = choices(9, moe.experts, 2, 64, "float32")
        with torch.inference_mode():
            together = moe.module(own.model).forward(hidden, index, weights)
            for token in range(9):
                one = slice(token, token + 1)
                alone = moe.module(own.model).forward(hidden[one], index[one], weights[one])
                torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_the_result_does_not_depend_on_what_is_resident(plain: bool, zoo: Zoo) -> None:
    """The order in which records arrive changes no bit."""
    with running(zoo("mixtral"), slots=1, plain=plain) as few, running(zoo("mixtral"), plain=plain) as all_of_them:
        moe = few.blueprint.experts_modules[2]
        inputs = choices(12, moe.experts, 2, 64, "float32")
        with torch.inference_mode():
            results = [moe.module(own.model).forward(*inputs) for own in (few, all_of_them, all_of_them)]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("plain", [False, True])
def test_leading_dimensions_are_kept(plain: bool, zoo: Zoo) -> None:
    with running(zoo("mixtral"), plain=plain) as own:
        moe = own.blueprint.experts_modules[0]
        hidden, index, weights = choices(6, moe.experts, 2, 64, "float32")
        with torch.inference_mode():
            flat = moe.module(own.model).forward(hidden, index, weights)
            boxed = moe.module(own.model).forward(hidden.view(2, 3, 64), index.view(2, 3, 2), weights.view(2, 3, 2))
        assert torch.equal(boxed, flat.view(2, 3, 64))


@pytest.mark.parametrize("plain", [False, True])
def test_null_choices_load_nothing_and_add_nothing(plain: bool, zoo: Zoo) -> None:
    """Some families choose "no expert": an index past the last one, or any index with weight 0."""
    with running(zoo("mixtral"), plain=plain) as own:
        moe = own.blueprint.experts_modules[0]
        hidden = choices(3, moe.experts, 2, 64, "float32")[0]
        index = torch.tensor([[5, moe.experts], [0, 5], [moe.experts, moe.experts + 1]])
        weights = torch.tensor([[0.5, 0.5], [0.0, 0.25], [1.0, 1.0]])
        with torch.inference_mode():
            result = moe.module(own.model).forward(hidden, index, weights)
            only = moe.module(own.model).forward(hidden[:2], torch.tensor([[5], [5]]), torch.ones(2, 1))
        torch.testing.assert_close(result, torch.cat([only * torch.tensor([[0.5], [0.25]]), torch.zeros(1, 64)]))
        assert own.cache.residents(0) == [5]


def test_pairs_are_grouped_by_expert_and_the_experts_of_most_and_latest_tokens_come_last() -> None:
    index = torch.tensor([[3, 1], [1, 2], [3, 0]])
    batch = TokenGroups(torch.zeros(3, 4), index, torch.ones(3, 2), 4)
    assert batch.rows == {3: [0, 4], 1: [1, 2], 2: [3], 0: [5]}
    assert batch.wanted == [2, 0, 1, 3]
    assert batch.tokens([0, 1, 4, 5]) == [0, 0, 2, 2]
    assert batch.outputs.shape == (6, 4)


def test_rows_that_no_expert_writes_are_zero() -> None:
    batch = TokenGroups(torch.ones(2, 4), torch.tensor([[0], [9]]), torch.ones(2, 1), 4)
    assert batch.wanted == [0]
    assert not batch.outputs[1].any()


def test_few_tokens_go_through_kernels_and_many_through_the_reference(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference_calls: list[int] = []
    original = PlainExperts._one

    def counted(self: PlainExperts, batch: TokenGroups, expert: int, slot: int) -> None:
        reference_calls.append(expert)
        original(self, batch, expert, slot)

    monkeypatch.setattr(FastExperts, "_one", counted)
    # Transposed experts: others have kernels for any number of tokens on some CPUs.
    with running(zoo("gpt_oss")) as own:
        moe = own.blueprint.experts_modules[0]
        index = torch.tensor([[0], [1], [1], *[[2]] * (BATCH_INVARIANT_TOKENS + 1)])
        with torch.inference_mode(), torch_threads(1):
            moe.module(own.model).forward(torch.randn(len(index), 64), index, torch.ones(len(index), 1))
    assert reference_calls == [2]


def test_with_pytorchs_threads_at_work_the_kernels_stay_out(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thread pools on the same cores slow each other down."""
    reference_calls: list[int] = []
    original = PlainExperts._one

    def counted(self: PlainExperts, batch: TokenGroups, expert: int, slot: int) -> None:
        reference_calls.append(expert)
        original(self, batch, expert, slot)

    monkeypatch.setattr(FastExperts, "_one", counted)
    with running(zoo("mixtral"), threads=2) as own:
        moe = own.blueprint.experts_modules[0]
        inputs = torch.randn(2, 64), torch.tensor([[0], [1]]), torch.ones(2, 1)
        for threads, expected in ((1, []), (2, [0, 1])):
            with torch.inference_mode(), torch_threads(threads):
                moe.module(own.model).forward(*inputs)
            assert reference_calls == expected


def test_many_tokens_have_the_same_result_on_one_thread_and_on_two(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are gathered and written by the kernels' threads, which are in no inference mode of their own."""
    monkeypatch.setattr("edgemoe.kernels.cpu.threads.MIN_SPLIT_NBYTES", 0)
    results = []
    for threads in (1, 2):
        with running(zoo("mixtral"), threads=threads) as own:
            moe = own.blueprint.experts_modules[0]
            inputs = choices(50, moe.experts, 2, 64, "float32")
            with torch.inference_mode(), torch_threads(1):
                results.append(moe.module(own.model).forward(*inputs))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_single_tokens_have_the_bits_of_a_batch_whatever_came_before(
    dtype: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their program is made once, and keeps its inputs and outputs in the same memory."""
    ran: list[object] = []
    run = PreparedExperts.run

    def counted(prepared: PreparedExperts, *given: Any) -> torch.Tensor:
        ran.append(prepared)
        return run(prepared, *given)

    monkeypatch.setattr(PreparedExperts, "run", counted)
    with running(zoo("qwen3_moe"), dtype=dtype) as own, torch.inference_mode(), torch_threads(1):
        moe = own.blueprint.experts_modules[0]
        forward = moe.module(own.model).forward
        width = next(part.shape[0] for part in moe.layout.parts if part.name == "down_proj")
        hidden, index, weights = choices(9, moe.experts, 3, width, dtype)
        for weight_dtype in (torch.float32, getattr(torch, dtype)):
            given = weights.to(weight_dtype)
            together = forward(hidden, index, given)
            alone = [forward(hidden[at : at + 1], index[at : at + 1], given[at : at + 1]) for at in range(9)]
            assert torch.equal(torch.cat(alone), together)
            # A token without one of its experts, and one that chooses an expert twice, take the general way.
            before = len(ran)
            forward(hidden[:1], index[:1], given[:1] * torch.tensor([1.0, 0.0, 1.0], dtype=given.dtype))
            forward(hidden[1:2], index[1:2, [0, 1, 0]], given[1:2])
            assert len(ran) == before
    assert len(ran) == 2 * 9
