"""What passes and drafts tell the prefetcher, over a real cache and with a lookahead that says what the test wants."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from edgemoe.cache import ExpertId
from edgemoe.experts.expert_predictor import RETRY_EVERY, ExpertPredictor
from edgemoe.experts.lookahead import MAX_PREDICTED_TOKENS, Lookahead
from edgemoe.prefetch.link_gauge import LinkGauge
from edgemoe.prefetch.prefetcher import Prefetcher
from tests.support.checkpoints import Running, Zoo, running

TOP_K = 2
NAMED = 2 * TOP_K
"""Experts that the lookahead names for a token."""


class Told(Lookahead):
    """Says what it is told to, and counts how often it is asked."""

    def __init__(self, own: Running) -> None:
        super().__init__(own.model, own.blueprint.experts_modules)
        self.says: dict[int, int] = {}
        self.looked: list[int] = []
        self.reached: list[int] = []

    def predict(self, layer: int, hidden: torch.Tensor, top_k: int) -> dict[int, int]:
        self.looked.append(layer)
        super().predict(layer, hidden, top_k)
        return {} if len(hidden) > MAX_PREDICTED_TOKENS else dict(self.says)

    def enter_layer(self, layer: int, hidden: torch.Tensor) -> None:
        self.reached.append(layer)
        super().enter_layer(layer, hidden)


class Seer:
    """A foresight, what it is made of, and what it brought."""

    def __init__(self, own: Running, *, enabled: bool = True) -> None:
        self.own = own
        self.cache = own.cache
        self.told = Told(own)
        self.layers = len(own.blueprint.experts_modules)
        self.prefetcher = Prefetcher(own.cache, self.layers, LinkGauge(own.cache._link))
        self.predictor = ExpertPredictor(
            own.cache, self.prefetcher, self.told, own.store.experts, TOP_K, enabled=enabled
        )
        self.brought: list[ExpertId] = []
        prefetch = own.cache.prefetch

        def keeping(experts: Sequence[ExpertId], needed_sooner: Collection[ExpertId] = ()) -> int:
            started = prefetch(experts, needed_sooner)
            self.brought += experts[:started]
            return started

        own.cache.prefetch = keeping  # type: ignore[method-assign]

    def run(self, *wanted: int, tokens: int = 1) -> None:
        """A pass that asks for the same experts of every layer."""
        hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
        for layer in range(self.layers):
            self.predictor.enter_layer(layer, wanted, hidden)
            list(self.cache.borrow(layer, wanted, lambda: self.predictor.predict_next(layer, hidden, TOP_K)))  # noqa: B023
        self.predictor.end_cycle()

    def outcomes(self, count: int, *, right: bool) -> None:
        """So many foretellings of every rank that is named, right or wrong."""
        for _ in range(count):
            for rank in range(NAMED):
                self.predictor._lookahead_scores.score({5: rank}, [5 if right else 6], [])


@contextmanager
def seeing(zoo: Zoo, slots: int | None = 12, *, enabled: bool = True) -> Iterator[Seer]:
    with running(zoo("mixtral"), slots) as own, torch.inference_mode():
        yield Seer(own, enabled=enabled)


def ids(layer: int, *numbers: int) -> list[ExpertId]:
    return [ExpertId(layer, number) for number in numbers]


# --- passes ----------------------------------------------------------------------------------------


def test_each_layer_is_foretold_from_the_one_before_it(zoo: Zoo) -> None:
    with seeing(zoo) as seer:
        seer.told.says = {3: 0, 6: 1}
        seer.run(1, 3)
        assert seer.told.looked == [1, 2, 3]
        assert seer.told.reached == [0, 1, 2, 3]
        assert set(seer.brought) == {expert for layer in (1, 2, 3) for expert in ids(layer, 3, 6)}
        assert [expert.layer for expert in seer.brought] == sorted(expert.layer for expert in seer.brought)
        totals = seer.predictor.lookahead_totals
        assert (totals.missing, totals.right, totals.wrong) == (6, 3, 3)
        assert (totals.recall, totals.precision) == (0.5, 0.5)


def test_what_is_brought_in_a_pass_is_for_the_layers_behind_the_one_that_it_is_in(zoo: Zoo) -> None:
    """With a draft's forecast of all of them as well."""
    with seeing(zoo) as seer:
        reached: list[int] = []
        issue = seer.prefetcher.issue

        def noting(after: int = -1) -> None:
            reached.append(after)
            issue(after)

        seer.prefetcher.issue = noting  # type: ignore[method-assign]
        seer.told.says = {3: 0}
        seer.run(1)
        assert reached == [0, 1, 2, 3]


def test_what_was_there_already_is_not_counted(zoo: Zoo) -> None:
    with seeing(zoo) as seer:
        seer.run(1, 3)
        seer.told.says = {3: 0, 1: 1}
        before = (seer.predictor.lookahead_totals.missing, list(seer.brought))
        seer.run(1, 3)
        assert (seer.predictor.lookahead_totals.missing, seer.brought) == before


def test_many_tokens_are_neither_foretold_nor_counted_as_missed(zoo: Zoo) -> None:
    with seeing(zoo) as seer:
        seer.told.says = {3: 0}
        seer.run(1, 3, tokens=MAX_PREDICTED_TOKENS + 1)
        assert seer.told.looked == [1, 2, 3]
        assert seer.brought == []
        assert seer.predictor.lookahead_totals.missing == 0
        assert [made._tokens for made in seer.told._maps if made is not None] == [MAX_PREDICTED_TOKENS + 1] * 3


def test_who_is_mostly_wrong_is_asked_on_one_pass_in_so_many(zoo: Zoo) -> None:
    """By the ranks that it names: of others nothing is known, however it does."""
    with seeing(zoo) as seer:
        seer.outcomes(600, right=False)
        for _ in range(2 * RETRY_EVERY):
            seer.run(1)
        assert seer.told.looked == [1, 2, 3] * 2
        seer.outcomes(600, right=True)
        seer.run(1)
        assert seer.told.looked == [1, 2, 3] * 3


def test_who_was_silenced_is_heard_again(zoo: Zoo) -> None:
    """On the passes on which it is tried it turns out to be right, until it is asked on all."""
    with seeing(zoo, slots=4) as seer:
        seer.told.says = {3: 0}
        seer.outcomes(30, right=False)
        listened = []
        for number in range(160):
            asked = len(seer.told.looked)
            seer.run(3 if number % 2 else 4)
            seer.told.says = {4 if number % 2 else 3: 0}
            listened.append(len(seer.told.looked) > asked)
        assert sum(listened[:32]) == 2
        assert all(listened[-32:])


def test_with_everything_resident_nobody_is_asked(zoo: Zoo) -> None:
    with seeing(zoo, slots=None) as seer:
        seer.told.says = {3: 0}
        seer.cache.prefetch([ExpertId(layer, number) for layer in range(4) for number in range(8)])
        seer.brought.clear()
        seer.run(1, 3)
        seer.predictor.begin_cycle()
        assert seer.predictor._forecast is None
        seer.predictor.add_prediction(0, torch.ones(1, 8) / 8, torch.ones(1))
        seer.predictor.issue()
        assert (seer.told.looked, seer.told.reached, seer.brought) == ([], [], [])
        seer.run(1)
        assert seer.predictor.forecast_totals.missing == 0


# --- drafts ----------------------------------------------------------------------------------------


def topk_weights(*pairs: tuple[int, float]) -> torch.Tensor:
    """One node's shares of a layer's eight experts."""
    row = torch.zeros(1, 8)
    for expert, share in pairs:
        row[0, expert] = share
    return row


def test_what_a_draft_wants_is_brought_in_the_order_of_the_layers(zoo: Zoo) -> None:
    with seeing(zoo) as seer:
        seer.predictor.begin_cycle()
        seer.predictor.add_prediction(2, topk_weights((5, 1.0)), torch.ones(1))
        seer.predictor.add_prediction(0, topk_weights((1, 0.7), (4, 0.3)), torch.ones(1))
        assert seer.brought == [], "only when it is told to"
        seer.predictor.issue()
        assert sorted(seer.brought[:2]) == ids(0, 1, 4)
        assert seer.brought[2:] == ids(2, 5)


def test_nodes_add_up_over_a_cycle(zoo: Zoo) -> None:
    with seeing(zoo) as seer:
        predictor = seer.predictor
        for _ in range(3):
            predictor.begin_cycle()
            predictor.add_prediction(0, topk_weights((1, 0.5), (2, 0.5)).repeat(3, 1), torch.tensor([1.0, 0.5, 0.25]))
            predictor.add_prediction(0, topk_weights((1, 1.0)), torch.tensor([0.1]))
            assert predictor._forecast is not None
            assert predictor._forecast._demand[0][1:3].tolist() == pytest.approx([0.975, 0.875])
            predictor.end_cycle()
            assert predictor._forecast is None


def test_a_draft_is_told_how_much_its_nodes_would_load(zoo: Zoo) -> None:
    """What is neither resident nor wanted by what was drafted before, among each node's choice."""
    with seeing(zoo) as seer:
        assert seer.predictor.add_prediction(0, topk_weights((1, 1.0)), torch.ones(1)).tolist() == [0], (
            "outside of a cycle"
        )
        seer.run(1)
        seer.predictor.begin_cycle()
        nodes = torch.cat(
            [topk_weights((1, 0.6), (2, 0.3), (3, 0.1)), topk_weights((4, 0.5), (5, 0.5)), topk_weights((1, 1.0))]
        )
        assert seer.predictor.add_prediction(0, nodes, torch.tensor([1.0, 0.5, 0.2])).tolist() == [1, 2, 0]
        nodes = torch.cat([topk_weights((5, 0.5), (6, 0.5)), topk_weights((2, 0.7), (4, 0.3))])
        assert seer.predictor.add_prediction(0, nodes, torch.ones(2)).tolist() == [1, 0]


def test_a_draft_is_scored_against_what_was_missing_at_its_beginning(zoo: Zoo) -> None:
    with seeing(zoo) as seer:
        seer.run(1)
        totals = seer.predictor.forecast_totals
        seer.predictor.begin_cycle()
        for layer in range(seer.layers):
            seer.predictor.add_prediction(layer, topk_weights((1, 0.4), (2, 0.3), (3, 0.3)), torch.ones(1))
        seer.predictor.issue()
        seer.run(1, 2, 6)
        assert (totals.missing, totals.right, totals.wrong) == (8, 4, 4)
        seer.run(1, 2, 6)
        assert totals.missing == 8, "the draft was for one pass"


def test_a_draft_without_a_pass_is_not_scored(zoo: Zoo) -> None:
    with seeing(zoo) as seer:
        seer.predictor.begin_cycle()
        seer.predictor.add_prediction(0, topk_weights((1, 1.0)), torch.ones(1))
        seer.predictor.end_cycle()
        seer.predictor.issue()
        assert seer.brought == []
        seer.run(1)
        assert seer.predictor.forecast_totals.missing == 0


def test_outside_of_a_cycle_nothing_is_foretold(zoo: Zoo) -> None:
    with seeing(zoo) as seer:
        seer.predictor.add_prediction(0, topk_weights((1, 1.0)), torch.ones(1))
        seer.predictor.issue()
        assert seer.brought == []


def test_switched_off_it_scores_drafts_and_brings_nothing(zoo: Zoo) -> None:
    with seeing(zoo, enabled=False) as seer:
        seer.told.says = {3: 0}
        seer.predictor.begin_cycle()
        seer.predictor.add_prediction(0, topk_weights((1, 0.5), (2, 0.5)), torch.ones(1))
        seer.predictor.issue()
        seer.run(1, 3)
        assert (seer.told.looked, seer.told.reached, seer.brought) == ([], [], [])
        totals = seer.predictor.forecast_totals
        assert (totals.missing, totals.right, totals.wrong) == (2, 1, 1)
        assert not seer.predictor.link_bound
