"""The experts of a draft head: its passes compute those that are resident, and few are loaded meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from edgemoe.cache import ExpertCache, ExpertId
from edgemoe.experts.draft_routing import DraftRouting
from edgemoe.experts.expert_layer import ExpertLayers

KEPT = 0.9
"""What is kept, from one pass to the next, of the weight that an expert was wanted with."""


class HeadExperts:
    """Routes a head's passes among resident experts, as SpecMoE routes the drafts of a model itself.

    A draft need not be exact. What a pass of the head loads would come over the link that the next verification waits
    for, several times a cycle; so the head does with what is there. One expert a cycle, the one that is missed most, is
    loaded while the draft is computed: the link is idle then.
    """

    def __init__(self, cache: ExpertCache, layers: ExpertLayers, top_k: int) -> None:
        """The head's experts are those of the last layers of `cache`; a router chooses `top_k` of them per token."""
        self._cache = cache
        self._layers = layers
        self._top_k = top_k
        self._own = range(layers.in_passes, len(cache.store.experts))
        self._wanted = {layer: torch.zeros(cache.store.experts[layer]) for layer in self._own}

    @property
    def complete(self) -> bool:
        """Whether nothing that the head chooses has to be loaded: every expert has a slot, or the head has none."""
        return not self._own or self._cache.complete

    @contextmanager
    def resident_only(self, rows: Sequence[int]) -> Iterator[None]:
        """In the block a pass of the head computes resident experts alone.

        `rows` are those of its tokens whose outputs are read: what they would have chosen is remembered.
        """
        routing = DraftRouting(self._cache, self._cache.store.experts, "reselect")
        with self._layers.overriding(routing):
            yield
        found = routing.wanted_on_host()
        for layer in self._own:
            if len(found[layer]):
                self._remember(layer, found[layer][list(rows)])

    def load_missed(self) -> None:
        """Starts loading the expert of each layer that was wanted most of those that are not resident.

        Demand loads overtake it. Where every resident one was wanted as much, nothing is loaded.
        """
        for layer in self._own:
            wanted, held = self._wanted[layer], torch.zeros(len(self._wanted[layer]), dtype=torch.bool)
            held[self._cache.residents(layer)] = True
            missed, least = wanted.masked_fill(held, 0.0), wanted[held].min() if held.any() else 0.0
            best = int(missed.argmax())
            if missed[best] > least:
                self._cache.prefetch([ExpertId(layer, best)])

    def _remember(self, layer: int, weights: torch.Tensor) -> None:
        best = weights.topk(min(self._top_k, weights.shape[-1]), dim=-1)
        chosen = torch.zeros_like(weights).scatter(-1, best.indices, best.values).sum(0)
        self._wanted[layer] = self._wanted[layer] * KEPT + chosen
        self._cache.touch(layer, chosen.nonzero().flatten().tolist())
