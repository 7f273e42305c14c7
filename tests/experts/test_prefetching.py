"""Engines with prefetching reply the same as without it, and account for every byte that they move."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgemoe import Engine, Sampling
from edgemoe.cache import ExpertCache, ExpertId
from edgemoe.experts.expert_predictor import ExpertPredictor
from edgemoe.experts.lookahead import Lookahead
from tests.support.checkpoints import DEVICES, PROMPT, Zoo, greedy, reference

TOKENS = 14
SLOW = 0.1
"""GB/s: a record of a tiny checkpoint takes about as long as its layer."""
PERIODIC = (PROMPT[:6] * 4)[:23]
"""A prompt with repeated n-grams."""


class Watched:
    """Counts what engines prefetch, need and predict while it is installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefetched = 0
        """Experts that were prefetched."""
        self.needed = 0
        """Experts that passes needed."""
        self.predicted = 0
        prefetch, enter_layer, predict_next = ExpertCache.prefetch, ExpertPredictor.enter_layer, Lookahead.predict

        def prefetching(
            cache: ExpertCache, experts: Sequence[ExpertId], needed_sooner: Collection[ExpertId] = ()
        ) -> int:
            started = prefetch(cache, experts, needed_sooner)
            self.prefetched += started
            return started

        def reaching(predictor: ExpertPredictor, layer: int, wanted: Sequence[int], *rest: Any) -> None:
            self.needed += len(wanted)
            enter_layer(predictor, layer, wanted, *rest)

        def looking(lookahead: Lookahead, *given: Any) -> dict[int, int]:
            self.predicted += 1
            return predict_next(lookahead, *given)

        monkeypatch.setattr(ExpertCache, "prefetch", prefetching)
        monkeypatch.setattr(ExpertPredictor, "enter_layer", reaching)
        monkeypatch.setattr(Lookahead, "predict", looking)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def assert_accounted(engine: Engine) -> None:
    """Every byte that crossed the link is counted once; prefetched experts not used yet are in their slots."""
    runtime = engine._runtime
    assert runtime is not None
    cache = runtime.cache
    cache.check_integrity()
    moving = [held.transfer for held in cache._held.values() if held.transfer is not None]
    while not all(transfer.done for transfer in moving):
        runtime.link.wait_any([transfer for transfer in moving if not transfer.done])
    load_reason = sum(cache.store.record_nbytes(expert) for expert, held in cache._held.items() if held.load_reason)
    assert engine.stats.bytes_loaded + load_reason == runtime.link.bytes_moved


def load(folder: Path, slots: int | str, **options: Any) -> Engine:
    return Engine.load(folder, expert_cache=slots, threads=1, state_folder="none", **{"device": "cpu"} | options)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_replies_do_not_depend_on_prefetching(family: str, zoo: Zoo, watched: Watched) -> None:
    folder = zoo(family)
    expected = greedy(reference(folder), PERIODIC, TOKENS)
    plan = Engine.plan_for(folder, device="cpu")
    few, half = plan.layers * (plan.top_k + 1), plan.experts // 2
    for slots, speculate in ((few, "off"), (half, "ngram"), (few, "self"), (half, "self")):
        with load(folder, slots, link_gbps=SLOW, speculate=speculate) as engine:
            assert list(engine.generate(PERIODIC, Sampling(max_tokens=TOKENS)).token_ids) == expected
            assert_accounted(engine)
    prefetched = watched.prefetched
    assert prefetched > 0
    with load(folder, half, link_gbps=SLOW, speculate="self", prefetch="off") as engine:
        assert list(engine.generate(PERIODIC, Sampling(max_tokens=TOKENS)).token_ids) == expected
        assert_accounted(engine)
    assert watched.prefetched == prefetched


def test_concurrent_requests_get_the_replies_that_they_get_alone(zoo: Zoo) -> None:
    folder = zoo("mixtral")
    requests = [(PROMPT[start : start + 9], Sampling(max_tokens=9, temperature=1.0, seed=start)) for start in range(5)]
    with load(folder, "100%", prefetch="off", speculate="off") as engine:
        expected = [engine.generate(*request).token_ids for request in requests]
    for speculate in ("off", "self"):
        with load(folder, 10, prefetch="auto", link_gbps=SLOW, speculate=speculate) as engine:
            replies = dict(engine.generate_batch(requests))
            assert_accounted(engine)
        assert [replies[number].token_ids for number in range(5)] == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("speculate", ["off", "self"])
def test_the_counters_add_up(speculate: str, zoo: Zoo, watched: Watched) -> None:
    with load(zoo("mixtral"), "40%", link_gbps=SLOW, speculate=speculate) as engine:
        for start in range(3):
            engine.generate(PROMPT[start:], Sampling(max_tokens=TOKENS))
        stats = engine.stats
        assert stats.hits + stats.misses == watched.needed > 0
        assert watched.prefetched > 0
        record = engine.plan.slot_nbytes
        assert stats.bytes_hit == stats.hits * record
        waited_for = stats.bytes_prefetched_late + stats.bytes_demanded
        assert stats.misses * record - stats.bytes_filled <= waited_for <= stats.misses * record
        assert 0 < stats.bytes_prefetched_used <= stats.bytes_hit
        assert 0 < stats.bytes_filled <= engine.plan.slots * record
        told = stats.to_dict()
        useful, late, wasted = (
            sum(told[f"{predictor}_bytes_{fate}"] for predictor in ("forecast", "lookahead"))
            for fate in ("useful", "late", "wasted")
        )
        assert 0 < useful <= stats.bytes_prefetched_used
        # A record may arrive between a pass's request and its wait.
        assert useful + late <= watched.needed * record
        # An expert prefetched for one pass may be used by the next.
        assert useful + late + wasted >= stats.bytes_prefetched_used + stats.bytes_prefetched_late
        assert_accounted(engine)
        for rate in (stats.lookahead_recall, stats.lookahead_precision):
            assert 0 < rate <= 1
        for rate in (stats.forecast_recall, stats.forecast_precision):
            assert (0 < rate <= 1) == (speculate == "self")


def test_with_room_for_all_experts_nothing_is_predicted(zoo: Zoo, watched: Watched) -> None:
    with load(zoo("mixtral"), "100%", link_gbps=SLOW, speculate="self") as engine:
        engine.generate(PROMPT, Sampling(max_tokens=TOKENS))
        stats = engine.stats
        assert (watched.prefetched, watched.predicted) == (0, 0)
        assert stats.forecast_recall == stats.lookahead_recall == 0
        assert stats.bytes_prefetched_wasted == 0
        assert_accounted(engine)


def test_switched_off_nothing_is_predicted(zoo: Zoo, watched: Watched) -> None:
    with load(zoo("mixtral"), "40%", prefetch="off", speculate="off") as engine:
        engine.generate(PROMPT, Sampling(max_tokens=TOKENS))
        assert (watched.prefetched, watched.predicted) == (0, 0)
        assert engine.stats.lookahead_recall == 0


@pytest.mark.parametrize(
    ("family", "how"),
    [("zaya", {}), ("inkling_text", {}), ("nemotron_h", {"moe_latent_size": 32})],
    ids=["a-network", "one-row-more", "latent-experts"],
)
def test_families_with_another_kind_of_router_run_without_predictions(
    family: str, how: dict[str, int], zoo: Zoo, watched: Watched
) -> None:
    folder = zoo(family, **how)
    expected = greedy(reference(folder), PROMPT, 6)
    with load(folder, "50%") as engine:
        assert list(engine.generate(PROMPT, Sampling(max_tokens=6)).token_ids) == expected
    assert (watched.prefetched, watched.predicted) == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_prompt_is_learnt_from_and_not_predicted(device: str, zoo: Zoo, watched: Watched) -> None:
    with load(zoo("mixtral"), "40%", device=device, speculate="off") as engine:
        engine.generate(PROMPT * 5, Sampling(max_tokens=1))
        runtime = engine._runtime
        assert runtime is not None
        assert (watched.prefetched, engine.stats.lookahead_recall) == (0, 0)
        assert watched.predicted > 0
        maps = runtime.predictor._lookahead._maps
        assert [made._tokens for made in maps if made is not None] == [5 * len(PROMPT)] * 3
