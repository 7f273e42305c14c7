"""Grouped kernels that look experts up in a table, queued before the host knows the choice, against the plain form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from edgemoe.experts.draft_routing import DraftRouting
from edgemoe.experts.expert_layer import ExpertLayer
from edgemoe.model.sequential_runner import PassInput
from tests.support.checkpoints import PROMPT, Running, Zoo, running
from tests.support.pretend_card import OnCard, running_on_card

pytest.importorskip("triton")

FAMILIES = ["qwen3_moe", "gpt_oss"]
"""Gated halves; transposed, biased and interleaved ones."""


@contextmanager
def both(zoo: Zoo, family: str, slots: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, OnCard]]:
    """The same checkpoint in the plain form, and on a card."""
    folder = zoo(family)
    with running(folder, plain=True) as plain, running_on_card(folder, slots, monkeypatch) as card:
        yield plain, card


def routed(tokens: int, layer: ExpertLayer, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, experts and routing weights, at random; one choice has the weight 0."""
    generator = torch.Generator().manual_seed(seed)
    experts = layer.experts.module.num_experts
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    weights[0, 1] = 0
    return torch.randn(tokens, width, generator=generator), index, weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_layers_give_what_the_plain_form_gives(
    zoo: Zoo, family: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few slots, so that records arrive in several rounds; 70 tokens take the tiles of prompts."""
    with both(zoo, family, 9, monkeypatch) as (plain, card), torch.inference_mode():
        for seed in (0, 0, 1):
            for expected_by, found_by in zip(plain.layers.layers[:2], card.layers.layers[:2], strict=True):
                given = routed(tokens, expected_by, plain.model.config.hidden_size, seed)
                expected, found = expected_by.compute(*given), found_by.compute(*given)
                assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
                card.cache.check_integrity()
        counters = card.cache.counters
        assert counters.hits > 0 or tokens == 70
        assert counters.misses > 0


def test_a_token_has_the_same_bits_alone_and_among_others(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_on_card(zoo("qwen3_moe"), None, monkeypatch) as card, torch.inference_mode():
        layer = card.layers.layers[0]
        hidden, index, weights = routed(5, layer, card.model.config.hidden_size, seed=3)
        together = layer.compute(hidden, index, weights)
        for token in range(5):
            one = slice(token, token + 1)
            assert torch.equal(layer.compute(hidden[one], index[one], weights[one]), together[one])


def test_padding_loads_nothing(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_on_card(zoo("qwen3_moe"), 9, monkeypatch) as card, torch.inference_mode():
        layer = card.layers.layers[0]
        hidden, index, weights = routed(4, layer, card.model.config.hidden_size, seed=3)
        alone = layer.compute(hidden[:1], index[:1], weights[:1])
        before = card.cache.counters.copy()
        with card.tools.padded(torch.tensor([1]), 1):
            padded = layer.compute(hidden, index, weights)
        assert torch.equal(padded[:1], alone)
        assert not padded[1:].any()
        assert card.cache.counters.misses == before.misses


def test_requests_of_a_complete_cache_are_counted_without_waiting(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_on_card(zoo("qwen3_moe"), None, monkeypatch) as card, torch.inference_mode():
        layer = card.layers.layers[0]
        given = routed(1, layer, card.model.config.hidden_size, seed=3)
        experts = card.cache.store.experts
        for number, count in enumerate(experts):
            list(card.cache.borrow(number, range(count)))
        before = card.cache.counters.copy()
        for _ in range(3):
            layer.compute(*given)
        # One choice has the weight 0; what the last request found is counted with the next one.
        assert card.cache.counters.hits - before.hits == 2
        assert len(card.tools.uncounted) == 1


@pytest.mark.parametrize("rule", ["reselect", "fewer"])
def test_drafts_are_computed_from_residents_alone(zoo: Zoo, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(zoo, "qwen3_moe", 12, monkeypatch) as (plain, card):
        runner, other = card.runner(), plain.runner()
        cache, own = runner.start(64), other.start(64)
        runner.run([PassInput(cache, PROMPT[:6])])
        other.run([PassInput(own, PROMPT[:6])])
        before = card.cache.counters.copy()
        residents = [card.cache.residents(layer) for layer in range(len(card.cache.store.experts))]
        drafts = DraftRouting(card.cache, card.cache.store.experts, rule)
        with card.layers.overriding(drafts):
            found = runner.run([PassInput(cache, [7])])[0]
        assert card.cache.counters == before
        assert [card.cache.residents(layer) for layer in range(len(residents))] == residents
        # The plain form, with the same experts resident.
        monkeypatch.setattr(plain.cache, "residents", lambda layer: residents[layer])
        with plain.layers.overriding(DraftRouting(plain.cache, plain.cache.store.experts, rule)):
            expected = other.run([PassInput(own, [7])])[0]
        assert (expected - found).abs().max() <= 1e-4 * (expected.max() - expected.min())
        assert [len(each) for each in drafts.wanted_on_host()] == [1] * len(residents)


def test_after_an_error_slots_wait_for_what_was_queued(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_on_card(zoo("qwen3_moe"), 9, monkeypatch) as card, torch.inference_mode():
        layer = card.layers.layers[0]
        given = routed(1, layer, card.model.config.hidden_size, seed=3)
        released = []
        monkeypatch.setattr(card.cache._link, "released_all", lambda: released.append(True))
        monkeypatch.setattr(card.tools.reads, "start", lambda values: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer.compute(*given)
        assert released == [True]
        card.cache.check_integrity()
