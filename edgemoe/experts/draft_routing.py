"""The routing of a self-draft pass among resident experts, by the rules of SpecMoE and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from edgemoe.cache import ExpertCache, accelerator
from edgemoe.experts.router_hook import Choice, hide, topk_weights

RULES = ("reselect", "affinity", "fewer")
"""What replaces an expert that is not resident.

- "reselect": the router chooses again among the resident experts.
- "affinity": the most similar resident expert takes its place (SpecMoE).
- "fewer": as "reselect", and only the `FEWER` experts with the greatest weights are computed.
"""
FEWER = 2
"""Experts per token under the rule "fewer"."""

MostSimilar = Callable[[int, torch.Tensor], torch.Tensor]
"""Maps a layer and its resident experts, bool [experts] on the CPU, to the most similar resident one of each expert."""


class DraftRouting:
    """A `RoutingOverride` for one drafting pass: resident experts only.

    No family's router can cause a load: a choice that no rule could replace gets the weight 0.
    """

    resident_only = True

    def __init__(
        self, cache: ExpertCache, experts: Sequence[int], rule: str, most_similar: MostSimilar | None = None
    ) -> None:
        """`experts[layer]` is the number of a layer's experts. The rule "affinity" needs `most_similar`."""
        self.wanted: list[list[torch.Tensor]] = [[] for _ in experts]
        """By layer, the routing weights that the pass would have had unrestricted, float32 [tokens, experts].

        One tensor for each call of the layer, in the order of the pass's tokens.
        """
        self.rule = rule
        self._cache = cache
        self._experts = experts
        self._most_similar = most_similar
        self._recorded_layer: int | None = None
        """The layer whose routing weights `choose` has recorded and that `substitute` has not yet served."""

    def choose(self, layer: int, choice: Choice) -> torch.Tensor:
        """See `RoutingOverride`. Records `wanted`, and leaves a mark that it did for `substitute`."""
        self._recorded_layer = layer
        self.wanted[layer].append(topk_weights(choice))
        if self.rule == "affinity":
            return choice.scores
        return hide(choice.scores, ~self.resident(layer, choice.scores.device))

    def substitute(
        self, layer: int, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `RoutingOverride`: resident experts only; None when no expert of `layer` is resident.

        Records `wanted` where `choose` was not called for `layer`.
        """
        if self._recorded_layer != layer:
            self.wanted[layer].append(self._spread(layer, index, weights))
        self._recorded_layer = None
        resident = self.resident(layer, index.device)
        # A device finds no expert for choices of weight 0; the host need not know whether there is any.
        if not accelerator.is_accelerator(index.device) and not bool(resident.any()):
            return None
        if self.rule == "affinity" and self._most_similar is not None:
            index = self._most_similar(layer, resident.cpu()).to(index.device)[index.clamp(max=len(resident) - 1)]
        inside = index < len(resident)
        index = index.clamp(max=len(resident) - 1)
        weights = torch.where(inside & resident[index], weights, torch.zeros_like(weights)).nan_to_num()
        if self.rule == "fewer":
            weights = _fewer(weights)
        # An expert of weight 0 is not computed, but must exist.
        return torch.where(weights != 0, index, resident.int().argmax()), weights

    @property
    def asks_host(self) -> bool:
        """Whether the rule needs what the host computes."""
        return self.rule == "affinity"

    def alike(self) -> DraftRouting:
        """The same rule for another pass. Only where it asks nothing of the host."""
        return DraftRouting(self._cache, self._experts, self.rule)

    def wanted_on_host(self) -> list[torch.Tensor]:
        """`wanted` by layer, float32 [tokens, experts] on the CPU; from a device in one copy where layers are alike."""
        layers = [torch.cat(each) if each else torch.zeros(0, 0) for each in self.wanted]
        if len({each.shape for each in layers}) == 1 and accelerator.is_accelerator(layers[0].device):
            return list(torch.stack(layers).cpu())
        return [each.cpu() for each in layers]

    def resident(self, layer: int, device: torch.device) -> torch.Tensor:
        """The experts of `layer` that are resident now, bool [experts]; on a device, those that its table has."""
        if self._cache.table is not None:
            return self._cache.table.device_table[layer, : self._experts[layer]] >= 0
        mask = torch.zeros(self._experts[layer], dtype=torch.bool)
        mask[self._cache.residents(layer)] = True
        return mask.to(device)

    def _spread(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The router's choice as float32 [tokens, experts]: all that is known of a router that does not use `topk`."""
        shape = (len(index), self._experts[layer])
        inside = index.clamp(max=shape[1] - 1)
        return torch.zeros(shape, device=index.device).scatter(-1, inside, weights.float().abs())


def _fewer(weights: torch.Tensor) -> torch.Tensor:
    """The `FEWER` greatest weights of each token, [tokens, top-k], scaled to the sum of all."""
    kept = weights.topk(min(FEWER, weights.shape[-1]), dim=-1)
    scale = weights.sum(-1, keepdim=True) / kept.values.sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.zeros_like(weights).scatter(-1, kept.indices, kept.values * scale)
