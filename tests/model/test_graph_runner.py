"""Passes whose dense part is replayed, against plain passes; graphs are stood in for by recordings of the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from edgemoe.experts.draft_routing import DraftRouting
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.sequential_runner import PassInput, SequentialRunner
from tests.support.checkpoints import Zoo, random_ids, running, spread
from tests.support.pretend_card import OnCard, running_on_card

pytest.importorskip("triton")

LAYERS = {"gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]}}
"""Of two layers: the interpreter is slow."""
TOLERANCE = 1e-4
"""Of the spread of logits: sums are in another order."""


@contextmanager
def both(
    zoo: Zoo, family: str, monkeypatch: pytest.MonkeyPatch, slots: int | None = 9
) -> Iterator[tuple[SequentialRunner, ModelRunner, OnCard]]:
    """The plain runner on the CPU, and the runner of a card."""
    folder = zoo(family, num_hidden_layers=2, **LAYERS.get(family, {}))
    with running(folder, plain=True) as plain, running_on_card(folder, slots, monkeypatch) as card:
        yield plain.runner(), ModelRunner(card.runner()), card


def assert_alike(expected: torch.Tensor, found: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (expected - found).abs().max() <= TOLERANCE * spread(expected)


def start(runner: SequentialRunner | ModelRunner, prompt: Sequence[int]) -> SequenceCache:
    cache = runner.start(64)
    runner.run([PassInput(cache, prompt)])
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_replayed_passes_give_the_logits_of_plain_ones(zoo: Zoo, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps beyond a window of 6, two sequences with padding, and a tree of which a path is kept."""
    with both(zoo, family, monkeypatch) as (plain, graphs, card):
        assert graphs.graph_refusal == ""
        prompts = [random_ids(5, seed=1), random_ids(9, seed=2)]
        own, others = [start(plain, each) for each in prompts], [start(graphs, each) for each in prompts]
        replays = sum(graph.replays for graph in card.capturer.graphs)
        for number in range(2):
            steps = [random_ids(1, seed=10 + number), random_ids(2, seed=20 + number)]
            expected = [plain.run([PassInput(cache, each)])[0] for cache, each in zip(own, steps, strict=True)]
            found = graphs.run([PassInput(cache, each) for cache, each in zip(others, steps, strict=True)])
            for pair in zip(expected, found, strict=True):
                assert_alike(*pair)
        assert sum(graph.replays for graph in card.capturer.graphs) == replays + 2 * (len(card.layers.layers) + 1)

        tree = DraftTree(7)
        first = tree.add(0, 11, 1.0)
        tree.add(0, 13, 1.0)
        last = tree.add(first, 17, 1.0)
        base, path = others[0].tokens, tree.path(last)
        others[0].mark()
        logits = graphs.run([tree_input(others[0], tree, range(len(tree)), ())])[0]
        others[0].rollback(base, path)
        for node in path:
            assert_alike(plain.step(own[0], [tree.tokens[node]]), logits[node])
        assert_alike(plain.step(own[0], [3]), graphs.step(others[0], [3]))


@pytest.mark.slow
def test_with_every_expert_resident_a_pass_is_one_graph(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(zoo, "qwen3_moe", monkeypatch, slots=None) as (plain, graphs, card):
        experts = card.cache.store.experts
        for layer, count in enumerate(experts):
            list(card.cache.borrow(layer, range(count)))
        prompt = random_ids(5, seed=1)
        own, other = start(plain, prompt), start(graphs, prompt)
        graphs.step(other, [4]), plain.step(own, [4])
        replays, before = [graph.replays for graph in card.capturer.graphs], card.cache.counters.copy()
        assert_alike(plain.step(own, [5]), graphs.step(other, [5]))
        assert sum(graph.replays for graph in card.capturer.graphs) == sum(replays) + 1
        # What a pass found is counted with the next one.
        assert card.cache.counters.hits - before.hits == card.model.config.num_experts_per_tok * len(experts)
        assert card.cache.counters.misses == before.misses


@pytest.mark.slow
def test_buffers_that_a_plain_pass_has_replaced_are_found(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(zoo, "qwen3_moe", monkeypatch) as (plain, graphs, _):
        own, other = plain.start(8), graphs.start(8)
        for tokens in (random_ids(5, seed=1), [4], random_ids(20, seed=2), [5]):
            assert_alike(plain.step(own, tokens), graphs.step(other, tokens))


@pytest.mark.slow
def test_drafts_are_replayed_and_leave_everything_as_it_was(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(zoo, "qwen3_moe", monkeypatch) as (_, graphs, card):
        prompt = random_ids(7, seed=3)
        cache, counts = start(graphs, prompt), card.cache.store.experts

        def draft() -> tuple[torch.Tensor, list[torch.Tensor]]:
            routing = DraftRouting(card.cache, counts, "reselect")
            cache.mark()
            with card.layers.overriding(routing):
                logits = graphs.step(cache, [9])
            cache.rollback(len(prompt))
            return logits, routing.wanted_on_host()

        found, wanted = draft()
        again, wanted_again = draft()
        assert torch.equal(found, again)
        # The plain form: the same pass without graphs.
        monkeypatch.setattr(graphs._graphs, "fits", lambda inputs: False)
        expected, wanted_plainly = draft()
        assert_alike(expected, found)
        for each, other, plainly in zip(wanted, wanted_again, wanted_plainly, strict=True):
            assert torch.equal(each, other)
            assert torch.allclose(each, plainly, atol=1e-4)


@pytest.mark.slow
def test_tokens_of_a_pass_have_the_bits_of_single_steps(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_on_card(zoo("qwen3_moe", num_hidden_layers=2), None, monkeypatch) as card:
        graphs = ModelRunner(card.runner())
        prompt, tokens = random_ids(5, seed=1), random_ids(3, seed=2)
        one, other = start(graphs, prompt), start(graphs, prompt)
        together = graphs.run([PassInput(one, tokens, every=True)])[0]
        for token, expected in zip(tokens, together, strict=True):
            assert torch.equal(graphs.step(other, [token]), expected)


@pytest.mark.slow
def test_families_that_cannot_be_captured_say_so(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(zoo, "deepseek_v3", monkeypatch) as (plain, graphs, _):
        assert "share" in graphs.graph_refusal
        prompt = random_ids(5, seed=1)
        assert_alike(plain.step(start(plain, prompt), [4]), graphs.step(start(graphs, prompt), [4]))


def test_what_a_capture_does_not_permit_is_a_refusal_and_a_fault_of_the_machine_is_not(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> None:
        def captured(*given: object) -> None:
            raise error

        monkeypatch.setattr("edgemoe.model.graph_runner.Capture.between_layers", captured)

    with running_on_card(zoo("qwen3_moe"), None, monkeypatch) as card:
        fails(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
        assert "cannot be captured" in ModelRunner(card.runner()).graph_refusal
        fails(RuntimeError("CUDA out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            ModelRunner(card.runner())
