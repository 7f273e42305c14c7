"""What overrides a model's routing in one pass: which experts a router may choose, and which of its choices count."""

from __future__ import annotations

from typing import Protocol

import torch

from edgemoe.experts.router_hook import Choice


class RoutingOverride(Protocol):
    """Overrides the routing of the passes under `ExpertLayers.overriding`.

    A MoE layer takes two calls, in this order: `choose` before the router's top-k, `substitute` before the experts run.
    `choose` keeps its decision about the layer in the override; the next `substitute` takes it and clears it. A router
    that does not choose by `topk` (phimoe, zaya, hashed layers) makes no call of `choose`: `substitute` then decides
    from the router's choice alone.
    """

    resident_only: bool
    """Whether the pass computes resident experts only: no load, no hit or miss counted, no use remembered."""

    def choose(self, layer: int, choice: Choice) -> torch.Tensor:
        """The scores, [tokens, experts], that the router of `layer` takes its top-k of. For `RouterMode`."""
        ...

    def substitute(
        self, layer: int, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The experts and routing weights to compute in the place of the router's, [tokens, top-k] each.

        An expert of weight 0 is not computed. None when no expert may be computed: the layer's output is zero.
        """
        ...
