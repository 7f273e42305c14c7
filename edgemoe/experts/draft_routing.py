"""What a self-draft does with an expert that is not resident: the rules of SpecMoE and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from edgemoe.cache import ExpertCache
from edgemoe.experts.router_hook import Choice, hidden_score, topk_weights

RULES = ("reselect", "affinity", "fewer")
"""Choose again among the resident ones; take the most similar resident one; choose again, and only the best few."""
FEWER = 2
"""Experts a token under the rule "fewer"."""

Nearest = Callable[[int, torch.Tensor], torch.Tensor]
"""For a layer and its resident experts, bool [experts]: the most similar resident one of each expert, [experts]."""


class DraftRouting:
    """Restricts one drafting pass to experts that are resident, and keeps what it would have chosen.

    Nothing is loaded whatever the family's router does: a choice that no rule could mend loses its weight.
    `wanted[layer]` are the unrestricted choices' shares, float32 [tokens, experts], one tensor for each time that
    the layer was passed, in the order of the pass's tokens.
    """

    def __init__(self, cache: ExpertCache, experts: Sequence[int], rule: str, nearest: Nearest | None = None) -> None:
        self.wanted: list[list[torch.Tensor]] = [[] for _ in experts]
        self._cache = cache
        self._experts = experts
        self._rule = rule
        self._nearest = nearest
        self._seen: int | None = None

    def choose(self, layer: int, choice: Choice) -> torch.Tensor:
        """The scores that `layer` chooses by. For `RouterMode`."""
        self._seen = layer
        self.wanted[layer].append(topk_weights(choice))
        if self._rule == "affinity":
            return choice.scores
        resident, scores = self.resident(layer, choice.scores.device), choice.scores
        return scores.masked_fill(~resident, hidden_score(scores))

    def substitute(
        self, layer: int, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Resident experts in the place of those chosen, [tokens, top-k] each; None when none at all is resident."""
        if self._seen != layer:
            # The router chose unseen: what it chose is all that is known of it.
            shape = (len(index), self._experts[layer])
            inside = index.clamp(max=shape[1] - 1)
            self.wanted[layer].append(
                torch.zeros(shape, device=index.device).scatter(-1, inside, weights.float().abs())
            )
        self._seen = None
        resident = self.resident(layer, index.device)
        if not bool(resident.any()):
            return None
        if self._rule == "affinity" and self._nearest is not None:
            index = self._nearest(layer, resident.cpu()).to(index.device)[index.clamp(max=len(resident) - 1)]
        inside = index < len(resident)
        index = index.clamp(max=len(resident) - 1)
        weights = torch.where(inside & resident[index], weights, torch.zeros_like(weights)).nan_to_num()
        if self._rule == "fewer":
            weights = _fewer(weights)
        # What weighs nothing is not computed; it must only name an expert that is there.
        return torch.where(weights != 0, index, resident.int().argmax()), weights

    def resident(self, layer: int, device: torch.device) -> torch.Tensor:
        """Bool [experts]: which of `layer` may be used now."""
        mask = torch.zeros(self._experts[layer], dtype=torch.bool)
        mask[self._cache.residents(layer)] = True
        return mask.to(device)


def _fewer(weights: torch.Tensor) -> torch.Tensor:
    """The `FEWER` greatest of each token's weights, [tokens, top-k], scaled to the sum of all."""
    kept = weights.topk(min(FEWER, weights.shape[-1]), dim=-1)
    scale = weights.sum(-1, keepdim=True) / kept.values.sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.zeros_like(weights).scatter(-1, kept.indices, kept.values * scale)
