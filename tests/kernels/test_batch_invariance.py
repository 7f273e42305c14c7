"""With the kernels a pass over drafts gives each token the bits of a step of its own.

So a reply does not depend on its drafts, in bf16 as in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn import functional as F

from edgemoe.kernels import batch_invariant_linear
from edgemoe.kernels.batch_invariant_mode import BatchInvariantMode, Span
from edgemoe.kernels.cpu.kernel_choice import few_tokens
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, torch_threads
from edgemoe.kernels.kernel_weight import KernelWeight
from edgemoe.model import packed_runner
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.sequential_runner import PassInput
from tests.support.checkpoints import Zoo, random_ids, running

PACKED = [
    "mixtral", "qwen3_moe", "gemma4", "exaone_moe", "cohere2_moe", "phimoe", "mimo_v2_flash", "olmoe", "gpt_oss",
]  # fmt: skip
"""Half of them have windows of 6 tokens in some layers, one has values narrower than keys, one transposed experts."""
DTYPES = ["bfloat16", "float32"]
CROWD = (1, 70, 9, 1, 130, 64, 1)
"""Tokens of sequences in one pass."""


class Drafted:
    """A runner with a prompt, the tokens that follow it, and the logits after each, computed one by one."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.prompt, self.tokens = random_ids(40), random_ids(17, seed=1)
        past = self.past()
        self.expected = [runner.step(past, [token]) for token in self.tokens]

    def past(self) -> SequenceCache:
        past = self.runner.start(100)
        self.runner.sequential.step(past, self.prompt)
        return past


def assert_each_as_alone(runner: ModelRunner, crowd: Sequence[int], begun: Callable[[int], bool]) -> None:
    """Sequences of so many new tokens have the bits of a pass of their own; those that have `begun` have a past."""

    def inputs() -> list[PassInput]:
        made = []
        for number, tokens in enumerate(crowd):
            cache = runner.start(200)
            if begun(tokens):
                runner.step(cache, random_ids(5 + number, seed=number))
            made.append(PassInput(cache, random_ids(tokens, seed=10 + number)))
        return made

    assert runner.packs
    assert runner.sequential.batch_invariant(inputs())
    expected = [runner.run([each])[0] for each in inputs()]
    assert all(map(torch.equal, expected, runner.run(inputs())))


def test_a_product_with_a_bias_is_one_of_single_tokens() -> None:
    """A router's, whose weight multiplies by a kernel where there is none."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((40, 512), (32, 512), (32,)))
    weight = KernelWeight(weight, KernelThreads(1))
    with torch.inference_mode(), torch_threads(1):
        alone = torch.cat([F.linear(row, weight, bias) for row in x.split(1)])
        with BatchInvariantMode([Span(40, one_by_one=True)]):
            assert torch.equal(F.linear(x, weight, bias), alone)
            assert torch.equal(F.linear(x, weight, bias=bias), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", PACKED)
def test_a_chain(family: str, dtype: str, zoo: Zoo) -> None:
    with running(zoo(family), 40, dtype=dtype) as own:
        drafted = Drafted(ModelRunner(own.runner()))
        for length in (2, 3, 5, 8, 17):
            past = drafted.past()
            found = drafted.runner.run([PassInput(past, drafted.tokens[:length], every=True)])[0]
            assert torch.equal(found, torch.stack(drafted.expected[:length])), length


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [each for each in PACKED if each != "gpt_oss"])
def test_a_crowd_of_steps_and_of_short_and_long_prompts(family: str, dtype: str, zoo: Zoo) -> None:
    """Each has the bits of a pass of its own, also the long prompts."""
    if dtype == "bfloat16" and few_tokens(torch.bfloat16) < sum(CROWD):
        pytest.skip("bf16 products of many tokens are PyTorch's on this CPU")
    with running(zoo(family), 40, dtype=dtype) as own:
        assert_each_as_alone(ModelRunner(own.runner()), CROWD, begun=lambda tokens: tokens == 1)


def test_the_logits_of_a_large_crowd_without_kernels(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small head has none: its products are PyTorch's, of one token each however many there are."""
    monkeypatch.setattr(batch_invariant_linear, "MIN_VALUES", 1 << 60)
    with running(zoo("qwen3_moe"), 40) as own:
        assert_each_as_alone(ModelRunner(own.runner()), (1,) * 70 + (80,), begun=lambda tokens: tokens == 1)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h", "lfm2_moe"])
def test_a_crowd_of_prompts_in_recurrent_mixers(
    family: str, late: bool, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short parts too, also where they come so late that their attention is one product."""
    if late:
        monkeypatch.setattr(packed_runner, "MIN_THREADED_PAIRS", 1)
    with running(zoo(family), 40) as own:
        assert_each_as_alone(ModelRunner(own.runner()), (1, 30, 9, 60, 70), begun=lambda tokens: True)


@pytest.mark.parametrize("family", PACKED)
def test_a_tree_and_the_step_after_it(family: str, zoo: Zoo) -> None:
    """Every right token has a wrong sibling before it; windows are shorter than the tree."""
    with running(zoo(family), 40, dtype="bfloat16") as own:
        drafted = Drafted(ModelRunner(own.runner()))
        tree = DraftTree(drafted.tokens[0])
        path = [0]
        for token in drafted.tokens[1:8]:
            tree.add(path[-1], (token + 1) % 256, 0.5)
            path.append(tree.add(path[-1], token, 0.5))
        past = drafted.past()
        past.mark()
        found = drafted.runner.run([tree_input(past, tree, range(len(tree)), ())])[0]
        assert torch.equal(found[path], torch.stack(drafted.expected[:8]))
        past.rollback(len(drafted.prompt), path)
        assert torch.equal(drafted.runner.step(past, [drafted.tokens[8]]), drafted.expected[8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", PACKED)
def test_a_batch(family: str, dtype: str, zoo: Zoo) -> None:
    """Sequences of different lengths, one of which appends several tokens."""
    with running(zoo(family), 40, dtype=dtype) as own:
        drafted = Drafted(ModelRunner(own.runner()))
        runner, count = drafted.runner, 9
        pasts = [drafted.past() for _ in range(count)]
        for number, past in enumerate(pasts):
            for token in drafted.tokens[:number]:
                runner.step(past, [token])
        several = PassInput(drafted.past(), drafted.tokens[:4], every=True)
        ones = [PassInput(past, [drafted.tokens[number]]) for number, past in enumerate(pasts)]
        *found, last = runner.run([*ones, several])
        assert torch.equal(torch.stack(found), torch.stack(drafted.expected[:count]))
        assert torch.equal(last, torch.stack(drafted.expected[:4]))


@pytest.mark.parametrize("columns", [32, 96, 2048, 12288])
def test_a_product_has_the_same_bits_with_any_number_of_others(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    weights = torch.randn(5, columns, generator=generator).to(torch.bfloat16)
    matrix, threads = SlotMatrix.of_weight(weights), KernelThreads(1)
    x = torch.randn(9, columns, generator=generator)

    def products(first: int, last: int) -> torch.Tensor:
        return matrix.multiply_one(threads, x[first:last])

    alone = torch.cat([products(place, place + 1) for place in range(len(x))])
    for count in range(2, len(x) + 1):
        assert torch.equal(products(0, count), alone[:count]), count
