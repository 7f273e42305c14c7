"""A MoE block that is a router and its experts, as steps after the attention of its layer, for few tokens.

With every expert of the model resident, what the layer of a single token computes is one program, and Python learns of
its choice afterwards. Otherwise the program ends with the choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgemoe.errors import is_device_or_memory_error
from edgemoe.experts.expert_layer import ExpertLayer, ExpertLayers, installed_in
from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.kernels.router import Router, Routing, router_of
from edgemoe.kernels.rows import in_dtypes, sum_step

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Step

PROBED_ROWS = 3


class AfterAttention:
    """Steps that continue the program of a layer's attention, and what Python does after them."""

    def __init__(self, router: Router, layer: ExpertLayer, slots: np.ndarray | None) -> None:
        """`slots` are those of all experts of the layer, int64 [experts], where all are resident and stay it."""
        self._router = router
        self._layer = layer
        self.slots = slots
        self._routing: Routing | None = None
        self._output: torch.Tensor | None = None

    def steps(self, residual: torch.Tensor, normed: torch.Tensor) -> list[Step]:
        """The steps from `normed`, which earlier ones write, [tokens, hidden size] of the model's dtype, as `residual`.

        With `slots` there is one token.
        """
        multiplied, experts = self._router.matrix.inputs, self._layer.experts
        if self.slots is None or experts.multiplies is None:
            inputs, widening = in_dtypes(normed, {multiplied})
            self._routing, steps = self._router.steps(inputs[multiplied])
            return [*widening, *steps]
        inputs, widening = in_dtypes(normed, {multiplied, experts.multiplies})
        found = np.zeros(self._router.top_k, np.int64)
        self._routing, steps = self._router.steps(inputs[multiplied], (self.slots, found))
        computing = experts.steps_of_one(inputs[experts.multiplies], self._routing.weights, found)
        if computing is not None:
            summed, own = computing
            self._output = torch.empty_like(residual)
            steps = [*steps, *own, sum_step(residual, summed, self._output)]
        return [*widening, *steps]

    def output(self, residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """The layer's output once the steps have run: `residual` with the output of the experts for `normed` added.

        All are [tokens, hidden size]. Valid until the steps run again.
        """
        assert self._routing is not None
        _, weights, chosen = self._routing
        if self._output is None:
            return residual + self._layer.compute(normed, chosen, weights)
        self._layer.hit(chosen[0].tolist())
        return self._output


class RoutedBlock:
    """A block whose output for some hidden states is that of its experts, chosen by its router, and nothing else."""

    def __init__(self, router: Router, layers: ExpertLayers, layer: ExpertLayer) -> None:
        self._router = router
        self._layers = layers
        self._layer = layer
        self._choosing: dict[int, AfterAttention] = {}
        self._computing: AfterAttention | None = None

    @classmethod
    def of(cls, block: nn.Module) -> RoutedBlock | None:
        """That of `block`; None where it has other parts, or computes something else."""
        children = list(block.children())
        routers = [router for child in children if (router := router_of(child))]
        experts = [(child, *installed) for child in children if (installed := installed_in(child))]
        if not len(children) == 2 == len(routers) + len(experts) or len(routers) != 1:
            return None
        (router,), ((module, layers, layer),) = routers, experts
        if list(block.parameters(recurse=False)) or not _is_plain(block, module, router):
            return None
        return cls(router, layers, layer)

    def fits(self) -> bool:
        """Whether a pass now routes and computes as usual."""
        return self._layers.as_usual

    def after_attention(self, tokens: int) -> AfterAttention:
        """What continues the program of the attention of so many tokens now. The same object while it is the same."""
        slots = self._layer.slots_for_one() if tokens == 1 else None
        if slots is None:
            if tokens not in self._choosing:
                self._choosing[tokens] = AfterAttention(self._router, self._layer, None)
            return self._choosing[tokens]
        if self._computing is None or self._computing.slots is not slots:
            self._computing = AfterAttention(self._router, self._layer, slots)
        return self._computing


def _is_plain(block: Any, experts: Any, router: Router) -> bool:
    """Whether `block` gives what its experts give for the router's choice, with a stand-in for the experts."""
    own = vars(experts)
    before = own["forward"]
    own["forward"] = _stand_in
    try:
        values = torch.randn(1, PROBED_ROWS, router.columns, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), torch_threads(1):
            hidden = values.to(router.dtype)
            found = block(hidden)
            _, weights, chosen = router.run(hidden)
            expected = _stand_in(hidden[0], chosen, weights)
        return isinstance(found, torch.Tensor) and torch.equal(found, expected[None])
    except Exception as error:
        if is_device_or_memory_error(error):
            raise
        # The family's forward was not written for such a call.
        return False
    finally:
        own["forward"] = before


def _stand_in(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """An output that differs for every input."""
    factors = (weights.float() * (1 + index)).sum(-1, keepdim=True)
    return torch.sin(3 * hidden) * factors.to(hidden.dtype)
