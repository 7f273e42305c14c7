"""What a model's MoE layers tell the prefetcher on their way, and what it is told about the next ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgemoe.cache import ExpertCache
from edgemoe.experts.lookahead import RANKS, Lookahead
from edgemoe.prefetch.forecast import BINS, Forecast
from edgemoe.prefetch.prefetcher import Prefetcher
from edgemoe.prefetch.scorecard import PredictionTotals

DRAFT, LOOKAHEAD = "draft", "lookahead"
LISTEN_EVERY = 16
"""A silenced lookahead is tried on one pass in so many, to notice when it would be right."""


class ExpertPredictor:
    """Two predictors over one prefetcher: the routing of drafts, and the lookahead from layer to layer."""

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
        """`experts[layer]` is how many a layer has, of which a token takes `top_k`.

        Without `enabled` drafts are still scored, and nothing is brought.
        """
        self._top_k = top_k
        self._enabled = enabled
        self._cache = cache
        self._prefetcher = prefetcher
        self._lookahead = lookahead
        self._experts = experts
        self._draft = prefetcher.watch(DRAFT, BINS, prior=0.7)
        self._ahead = prefetcher.watch(LOOKAHEAD, RANKS, prior=0.4)
        self._passes = 0
        self._forecast: Forecast | None = None
        self._resident: list[list[int]] = []

    @property
    def forecast(self) -> PredictionTotals:
        """The record of the drafts' routing."""
        return self._draft.totals

    @property
    def ahead(self) -> PredictionTotals:
        """The record of the lookahead."""
        return self._ahead.totals

    @property
    def link_bound(self) -> bool:
        """Whether passes wait for the link more than they compute, so that knowing sooner is worth computing for."""
        return self._enabled and not self._cache.complete and self._prefetcher.link_busy > 0.5

    @property
    def load_seconds(self) -> float:
        """How long a pass waits for an expert that it lacks, as measured lately."""
        return self._prefetcher.load_seconds

    # --- drafts ------------------------------------------------------------------------------------

    def begin_cycle(self) -> None:
        """A draft begins: what is resident now needs no forecast."""
        if not self._cache.complete:
            self._forecast = Forecast(self._experts)
            self._resident = [self._cache.residents(layer) for layer in range(len(self._experts))]

    def add_prediction(self, layer: int, shares: torch.Tensor, certain: torch.Tensor) -> torch.Tensor:
        """Nodes with the path probabilities `certain`, [nodes], gave `shares`, [nodes, experts], to `layer`.

        Returns how many experts each chose that are neither resident nor wanted by nodes before, int64 [nodes].
        """
        if self._forecast is None:
            return torch.zeros(len(shares), dtype=torch.long)
        shares = shares.cpu()
        new = self._forecast.news(layer, shares, self._top_k)
        new[:, self._resident[layer]] = False
        self._forecast.add(layer, shares, certain)
        self._prefetcher.add_prediction(DRAFT, layer, self._forecast.bins(layer), self._resident[layer])
        return new.sum(1)

    def issue(self) -> None:
        """Lets the link begin with what is foretold."""
        if self._enabled:
            self._prefetcher.issue()

    def end_cycle(self) -> None:
        """The pass that was foretold is over."""
        self._forecast = None
        self._prefetcher.drop()

    # --- passes ------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, wanted: Sequence[int], hidden: torch.Tensor) -> None:
        """A pass asks for `wanted` of `layer`, whose experts `hidden`, [tokens, hidden size], enters."""
        self._prefetcher.enter_layer(layer, wanted)
        self._passes += layer == 0
        if self._enabled and not self._cache.complete:
            self._lookahead.enter_layer(layer, hidden)

    def predict_next(self, layer: int, hidden: torch.Tensor, top_k: int) -> None:
        """With the loads of `layer` on the link, foretells the next one from its input, [tokens, hidden size]."""
        if not self._enabled or self._cache.complete:
            return
        if self._lookahead.names(layer + 1) and self._listens(self._lookahead.ranks(layer + 1, top_k)):
            named = self._lookahead.predict(layer + 1, hidden, top_k)
            if named:
                self._prefetcher.add_prediction(LOOKAHEAD, layer + 1, named, self._cache.residents(layer + 1))
        self._prefetcher.issue(layer)

    def _listens(self, ranks: int) -> bool:
        least = self._prefetcher.break_even(1, in_pass=True)
        return self._passes % LISTEN_EVERY == 0 or any(self._ahead.rate(rank) >= least for rank in range(ranks))
