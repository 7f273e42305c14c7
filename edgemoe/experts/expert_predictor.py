"""Predicts the experts of coming passes and layers, and gives the predictions to the prefetcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgemoe.cache import ExpertCache
from edgemoe.experts.lookahead import MAX_RANKS, Lookahead, RouterScores
from edgemoe.prefetch.forecast import BINS, Forecast
from edgemoe.prefetch.prefetcher import Prefetcher
from edgemoe.prefetch.scorecard import PredictionTotals

DRAFT, LOOKAHEAD = "draft", "lookahead"
RETRY_EVERY = 16
"""A lookahead whose predictions do not pay is retried on one pass in this many."""


class ExpertPredictor:
    """Two predictors with one prefetcher: the routing of drafts, and the lookahead from one layer to the next.

    Both are scored against the experts that the passes then choose. While the cache holds every expert, neither runs.
    """

    def __init__(
        self,
        cache: ExpertCache,
        prefetcher: Prefetcher,
        lookahead: Lookahead,
        experts: Sequence[int],
        top_k: int,
        *,
        enabled: bool = True,
    ) -> None:
        """`experts[layer]` is the number of a layer's experts, of which a router chooses `top_k` per token.

        Not `enabled`, drafts are still scored, but no lookahead runs and no expert is prefetched.
        """
        self._top_k = top_k
        self._enabled = enabled
        self._cache = cache
        self._prefetcher = prefetcher
        self._lookahead = lookahead
        self._experts = experts
        self._draft_scores = prefetcher.register(DRAFT, BINS, prior=0.7)
        self._lookahead_scores = prefetcher.register(LOOKAHEAD, MAX_RANKS, prior=0.4)
        self._passes = 0
        self._forecast: Forecast | None = None
        self._resident: list[list[int]] = []

    @property
    def forecast_totals(self) -> PredictionTotals:
        """How good the predictions from drafts were."""
        return self._draft_scores.totals

    @property
    def lookahead_totals(self) -> PredictionTotals:
        """How good the predictions of the lookahead were."""
        return self._lookahead_scores.totals

    @property
    def complete(self) -> bool:
        """Whether every expert has a slot, so that there is nothing to predict."""
        return self._cache.complete

    @property
    def link_bound(self) -> bool:
        """Whether the link is busy for more than half of the time: predicting sooner is then worth a drafting pass."""
        return self._enabled and not self._cache.complete and self._prefetcher.link_busy > 0.5

    @property
    def load_seconds(self) -> float:
        """Seconds that a pass has lately waited for an expert that was not resident."""
        return self._prefetcher.load_seconds

    # --- drafts ------------------------------------------------------------------------------------

    def begin_cycle(self) -> None:
        """A draft begins: forgets the last forecast. Experts that are resident now are not predicted."""
        if not self._cache.complete:
            self._forecast = Forecast(self._experts)
            self._resident = [self._cache.residents(layer) for layer in range(len(self._experts))]

    def add_prediction(self, layer: int, weights: torch.Tensor, path_probabilities: torch.Tensor) -> torch.Tensor:
        """Adds the nodes of a draft to the forecast of `layer`.

        `weights` is float32 [nodes, experts], the routing weights of `topk_weights`; `path_probabilities` is [nodes].
        Returns how many experts each node chose that are neither resident nor chosen by an earlier node, int64 [nodes].
        """
        if self._forecast is None:
            return torch.zeros(len(weights), dtype=torch.long)
        weights = weights.cpu()
        new = self._forecast.new_experts(layer, weights, self._top_k)
        new[:, self._resident[layer]] = False
        self._forecast.add(layer, weights, path_probabilities)
        self._prefetcher.add_prediction(DRAFT, layer, self._forecast.bins(layer), self._resident[layer])
        return new.sum(1)

    def issue(self) -> None:
        """Starts the prefetches that the predictions are worth."""
        if self._enabled:
            self._prefetcher.issue()

    def end_cycle(self) -> None:
        """The verification is over: drops the forecast and the predictions that were not used."""
        self._forecast = None
        self._prefetcher.drop()

    # --- passes ------------------------------------------------------------------------------------

    def queue_scores(self, layer: int, hidden: torch.Tensor, top_k: int) -> list[torch.Tensor]:
        """What the host has to know of `hidden` for `enter_layer` and `predict_next`, computed on the device.

        For callers that bring it to the host with what they read anyway: as `Lookahead.queue_scores`, or nothing.
        """
        if not self._enabled or self._cache.complete:
            return []
        following = self._predicts(layer, top_k)
        if not following and not self._lookahead.learns(layer):
            return []
        return self._lookahead.queue_scores(layer, hidden, following=following)

    def enter_layer(
        self, layer: int, wanted: Sequence[int], hidden: torch.Tensor, scores: RouterScores | None = None
    ) -> None:
        """A pass enters `layer`, and its router has chosen the experts `wanted`.

        Scores the layer's predictions and trains the lookahead on the experts' input `hidden`, [tokens, hidden size].
        With `scores` nothing more is computed from `hidden`.
        """
        self._prefetcher.enter_layer(layer, wanted)
        self._passes += layer == 0
        if self._enabled and not self._cache.complete and (scores is None or scores.own is not None):
            self._lookahead.enter_layer(layer, hidden, scores and scores.own)

    def predict_next(self, layer: int, hidden: torch.Tensor, top_k: int, scores: RouterScores | None = None) -> None:
        """Predicts the experts of the next layer from the input of this one's experts, [tokens, hidden size].

        Called once the loads of `layer` are on the link; starts the prefetches that the predictions are worth. With
        `scores` nothing more is computed from `hidden`: without those of the next layer, nothing is predicted.
        """
        if not self._enabled or self._cache.complete:
            return
        following = layer + 1
        predicts = self._predicts(layer, top_k) if scores is None else scores.following is not None
        if predicts:
            predicted = self._lookahead.predict(following, hidden, top_k, scores)
            if predicted:
                self._prefetcher.add_prediction(LOOKAHEAD, following, predicted, self._cache.residents(following))
        self._prefetcher.issue(layer)

    def _predicts(self, layer: int, top_k: int) -> bool:
        """Whether the layer after `layer` is to be predicted."""
        following = layer + 1
        return self._lookahead.can_predict(following) and self._pays(self._lookahead.ranks(following, top_k))

    def _pays(self, ranks: int) -> bool:
        """Whether any of the first `ranks` ranks is right often enough to prefetch, or a retry is due."""
        if self._passes % RETRY_EVERY == 0:
            return True
        min_rate = self._prefetcher.break_even(1, in_pass=True)
        return any(self._lookahead_scores.rate(rank) >= min_rate for rank in range(ranks))
