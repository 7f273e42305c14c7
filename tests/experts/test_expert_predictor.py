"""Predictions from passes and drafts over a real cache, with a lookahead whose predictions the test sets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from edgemoe.cache import ExpertId
from edgemoe.experts.expert_predictor import RETRY_EVERY, ExpertPredictor
from edgemoe.experts.lookahead import MAX_PREDICTED_TOKENS, Lookahead, RouterScores
from edgemoe.prefetch.link_gauge import LinkGauge
from edgemoe.prefetch.prefetcher import Prefetcher
from tests.support.checkpoints import Running, Zoo, running

TOP_K = 2
PREDICTED_RANKS = 2 * TOP_K
"""Ranks that the lookahead predicts for a token."""


class ScriptedLookahead(Lookahead):
    """Returns predictions that the test sets, and records its calls."""

    def __init__(self, own: Running) -> None:
        super().__init__(own.model, own.blueprint.experts_modules)
        self.predictions: dict[int, int] = {}
        self.predicted: list[int] = []
        self.entered: list[int] = []

    def predict(
        self, layer: int, hidden: torch.Tensor, top_k: int, scores: RouterScores | None = None
    ) -> dict[int, int]:
        self.predicted.append(layer)
        super().predict(layer, hidden, top_k, scores)
        return {} if len(hidden) > MAX_PREDICTED_TOKENS else dict(self.predictions)

    def enter_layer(self, layer: int, hidden: torch.Tensor, own: torch.Tensor | None = None) -> None:
        self.entered.append(layer)
        super().enter_layer(layer, hidden, own)


class Harness:
    """A predictor, its parts, and the experts that it prefetched."""

    def __init__(self, own: Running, *, enabled: bool = True) -> None:
        self.own = own
        self.cache = own.cache
        self.lookahead = ScriptedLookahead(own)
        self.layers = len(own.blueprint.experts_modules)
        self.prefetcher = Prefetcher(own.cache, self.layers, LinkGauge(own.cache._link))
        self.predictor = ExpertPredictor(
            own.cache, self.prefetcher, self.lookahead, own.store.experts, TOP_K, enabled=enabled
        )
        self.prefetched: list[ExpertId] = []
        prefetch = own.cache.prefetch

        def keeping(experts: Sequence[ExpertId], needed_sooner: Collection[ExpertId] = ()) -> int:
            started = prefetch(experts, needed_sooner)
            self.prefetched += experts[:started]
            return started

        own.cache.prefetch = keeping  # type: ignore[method-assign]

    def run(self, *wanted: int, tokens: int = 1) -> None:
        """A pass whose routers choose the same experts in every layer."""
        hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
        for layer in range(self.layers):
            self.predictor.enter_layer(layer, wanted, hidden)
            list(self.cache.borrow(layer, wanted, lambda: self.predictor.predict_next(layer, hidden, TOP_K)))  # noqa: B023
        self.predictor.end_cycle()

    def outcomes(self, count: int, *, right: bool) -> None:
        """Scores `count` predictions of every rank, right or wrong."""
        for _ in range(count):
            for rank in range(PREDICTED_RANKS):
                self.predictor._lookahead_scores.score({5: rank}, [5 if right else 6], [])


@contextmanager
def predicting(zoo: Zoo, slots: int | None = 12, *, enabled: bool = True) -> Iterator[Harness]:
    with running(zoo("mixtral"), slots) as own, torch.inference_mode():
        yield Harness(own, enabled=enabled)


def ids(layer: int, *numbers: int) -> list[ExpertId]:
    return [ExpertId(layer, number) for number in numbers]


# --- passes ----------------------------------------------------------------------------------------


def test_each_layer_is_predicted_from_the_one_before_it(zoo: Zoo) -> None:
    with predicting(zoo) as harness:
        harness.lookahead.predictions = {3: 0, 6: 1}
        harness.run(1, 3)
        assert harness.lookahead.predicted == [1, 2, 3]
        assert harness.lookahead.entered == [0, 1, 2, 3]
        assert set(harness.prefetched) == {expert for layer in (1, 2, 3) for expert in ids(layer, 3, 6)}
        assert [expert.layer for expert in harness.prefetched] == sorted(expert.layer for expert in harness.prefetched)
        totals = harness.predictor.lookahead_totals
        assert (totals.missing, totals.right, totals.wrong) == (6, 3, 3)
        assert (totals.recall, totals.precision) == (0.5, 0.5)


def test_a_pass_prefetches_only_for_the_layers_after_the_current_one(zoo: Zoo) -> None:
    """Also when a draft has predicted all layers."""
    with predicting(zoo) as harness:
        entered: list[int] = []
        issue = harness.prefetcher.issue

        def noting(after: int = -1) -> None:
            entered.append(after)
            issue(after)

        harness.prefetcher.issue = noting  # type: ignore[method-assign]
        harness.lookahead.predictions = {3: 0}
        harness.run(1)
        assert entered == [0, 1, 2, 3]


def test_predictions_of_resident_experts_are_not_counted(zoo: Zoo) -> None:
    with predicting(zoo) as harness:
        harness.run(1, 3)
        harness.lookahead.predictions = {3: 0, 1: 1}
        before = (harness.predictor.lookahead_totals.missing, list(harness.prefetched))
        harness.run(1, 3)
        assert (harness.predictor.lookahead_totals.missing, harness.prefetched) == before


def test_a_pass_of_many_tokens_is_not_predicted_and_its_misses_are_not_counted(zoo: Zoo) -> None:
    with predicting(zoo) as harness:
        harness.lookahead.predictions = {3: 0}
        harness.run(1, 3, tokens=MAX_PREDICTED_TOKENS + 1)
        assert harness.lookahead.predicted == [1, 2, 3]
        assert harness.prefetched == []
        assert harness.predictor.lookahead_totals.missing == 0
        assert [made._tokens for made in harness.lookahead._maps if made is not None] == [MAX_PREDICTED_TOKENS + 1] * 3


def test_a_lookahead_that_does_not_pay_is_retried_now_and_then(zoo: Zoo) -> None:
    """Only the ranks that it predicts count."""
    with predicting(zoo) as harness:
        harness.outcomes(600, right=False)
        for _ in range(2 * RETRY_EVERY):
            harness.run(1)
        assert harness.lookahead.predicted == [1, 2, 3] * 2
        harness.outcomes(600, right=True)
        harness.run(1)
        assert harness.lookahead.predicted == [1, 2, 3] * 3


def test_a_lookahead_that_pays_again_runs_on_every_pass(zoo: Zoo) -> None:
    """Its retries turn out to be right."""
    with predicting(zoo, slots=4) as harness:
        harness.lookahead.predictions = {3: 0}
        harness.outcomes(30, right=False)
        listened = []
        for number in range(160):
            asked = len(harness.lookahead.predicted)
            harness.run(3 if number % 2 else 4)
            harness.lookahead.predictions = {4 if number % 2 else 3: 0}
            listened.append(len(harness.lookahead.predicted) > asked)
        assert sum(listened[:32]) == 2
        assert all(listened[-32:])


def test_with_every_expert_resident_nothing_is_predicted(zoo: Zoo) -> None:
    with predicting(zoo, slots=None) as harness:
        harness.lookahead.predictions = {3: 0}
        harness.cache.prefetch([ExpertId(layer, number) for layer in range(4) for number in range(8)])
        harness.prefetched.clear()
        harness.run(1, 3)
        harness.predictor.begin_cycle()
        assert harness.predictor._forecast is None
        harness.predictor.add_prediction(0, torch.ones(1, 8) / 8, torch.ones(1))
        harness.predictor.issue()
        assert (harness.lookahead.predicted, harness.lookahead.entered, harness.prefetched) == (
            [],
            [],
            [],
        )
        harness.run(1)
        assert harness.predictor.forecast_totals.missing == 0


# --- drafts ----------------------------------------------------------------------------------------


def topk_weights(*pairs: tuple[int, float]) -> torch.Tensor:
    """One node's routing weights over a layer's eight experts."""
    row = torch.zeros(1, 8)
    for expert, weight in pairs:
        row[0, expert] = weight
    return row


def test_a_drafts_experts_are_prefetched_in_the_order_of_the_layers(zoo: Zoo) -> None:
    with predicting(zoo) as harness:
        harness.predictor.begin_cycle()
        harness.predictor.add_prediction(2, topk_weights((5, 1.0)), torch.ones(1))
        harness.predictor.add_prediction(0, topk_weights((1, 0.7), (4, 0.3)), torch.ones(1))
        assert harness.prefetched == [], "no prefetch before `issue`"
        harness.predictor.issue()
        assert sorted(harness.prefetched[:2]) == ids(0, 1, 4)
        assert harness.prefetched[2:] == ids(2, 5)


def test_a_forecast_sums_the_nodes_of_one_cycle(zoo: Zoo) -> None:
    with predicting(zoo) as harness:
        predictor = harness.predictor
        for _ in range(3):
            predictor.begin_cycle()
            predictor.add_prediction(0, topk_weights((1, 0.5), (2, 0.5)).repeat(3, 1), torch.tensor([1.0, 0.5, 0.25]))
            predictor.add_prediction(0, topk_weights((1, 1.0)), torch.tensor([0.1]))
            assert predictor._forecast is not None
            assert predictor._forecast._demand[0][1:3].tolist() == pytest.approx([0.975, 0.875])
            predictor.end_cycle()
            assert predictor._forecast is None


def test_a_draft_learns_how_many_experts_each_node_would_load(zoo: Zoo) -> None:
    """Those that are neither resident nor chosen by an earlier node."""
    with predicting(zoo) as harness:
        assert harness.predictor.add_prediction(0, topk_weights((1, 1.0)), torch.ones(1)).tolist() == [0], (
            "outside of a cycle"
        )
        harness.run(1)
        harness.predictor.begin_cycle()
        nodes = torch.cat(
            [topk_weights((1, 0.6), (2, 0.3), (3, 0.1)), topk_weights((4, 0.5), (5, 0.5)), topk_weights((1, 1.0))]
        )
        assert harness.predictor.add_prediction(0, nodes, torch.tensor([1.0, 0.5, 0.2])).tolist() == [1, 2, 0]
        nodes = torch.cat([topk_weights((5, 0.5), (6, 0.5)), topk_weights((2, 0.7), (4, 0.3))])
        assert harness.predictor.add_prediction(0, nodes, torch.ones(2)).tolist() == [1, 0]


def test_a_draft_is_scored_against_the_experts_that_were_missing_when_it_began(zoo: Zoo) -> None:
    with predicting(zoo) as harness:
        harness.run(1)
        totals = harness.predictor.forecast_totals
        harness.predictor.begin_cycle()
        for layer in range(harness.layers):
            harness.predictor.add_prediction(layer, topk_weights((1, 0.4), (2, 0.3), (3, 0.3)), torch.ones(1))
        harness.predictor.issue()
        harness.run(1, 2, 6)
        assert (totals.missing, totals.right, totals.wrong) == (8, 4, 4)
        harness.run(1, 2, 6)
        assert totals.missing == 8, "the draft was for one pass"


def test_a_draft_without_a_pass_is_not_scored(zoo: Zoo) -> None:
    with predicting(zoo) as harness:
        harness.predictor.begin_cycle()
        harness.predictor.add_prediction(0, topk_weights((1, 1.0)), torch.ones(1))
        harness.predictor.end_cycle()
        harness.predictor.issue()
        assert harness.prefetched == []
        harness.run(1)
        assert harness.predictor.forecast_totals.missing == 0


def test_outside_of_a_cycle_nothing_is_predicted(zoo: Zoo) -> None:
    with predicting(zoo) as harness:
        harness.predictor.add_prediction(0, topk_weights((1, 1.0)), torch.ones(1))
        harness.predictor.issue()
        assert harness.prefetched == []


def test_switched_off_it_scores_drafts_and_prefetches_nothing(zoo: Zoo) -> None:
    with predicting(zoo, enabled=False) as harness:
        harness.lookahead.predictions = {3: 0}
        harness.predictor.begin_cycle()
        harness.predictor.add_prediction(0, topk_weights((1, 0.5), (2, 0.5)), torch.ones(1))
        harness.predictor.issue()
        harness.run(1, 3)
        assert (harness.lookahead.predicted, harness.lookahead.entered, harness.prefetched) == (
            [],
            [],
            [],
        )
        totals = harness.predictor.forecast_totals
        assert (totals.missing, totals.right, totals.wrong) == (2, 1, 1)
        assert not harness.predictor.link_bound
