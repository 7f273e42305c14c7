"""Routers that choose by softmax, for few tokens by one program: their product, the choice, and its weights.

A router of one of the usual forms has a weight and no other parameters: softmax over all experts, then the largest,
whose probabilities some families divide by their sum.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from edgemoe.errors import is_device_or_memory_error
from edgemoe.kernels.batch_invariant_linear import has_kernel
from edgemoe.kernels.cpu.arrays import Groups, Job, address
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Program, Step

PROBED_ROWS = 5
_ATTRIBUTE = "edgemoe_router"
_DTYPES = (torch.bfloat16, torch.float32)


class Routing(NamedTuple):
    """What a router finds for some tokens."""

    products: torch.Tensor
    """With the rows of its weight, float32 [tokens, experts]."""
    weights: torch.Tensor
    """Of the chosen experts, [tokens, top-k] in the family's dtype."""
    chosen: torch.Tensor
    """int64 [tokens, top-k], the heaviest expert first."""


class Router:
    """The arithmetic of one router."""

    def __init__(self, weight: torch.Tensor, top_k: int, threads: KernelThreads) -> None:
        """`weight` is [experts, hidden size], for which `has_kernel`; it must stay where it is."""
        self.experts, self.columns = weight.shape
        self.dtype = weight.dtype
        self.weights_dtype = weight.dtype
        self.normalises = False
        self.top_k = top_k
        self.matrix = SlotMatrix.of_weight(weight)
        self._threads = threads
        self._one: tuple[Program, torch.Tensor, Routing] | None = None
        """For a single token: the program, which is made once, its input and its results."""

    def fits(self, hidden: torch.Tensor) -> bool:
        """Whether `run` takes `hidden`."""
        known = hidden.dtype is self.dtype and hidden.shape[-1] == self.columns and hidden.numel() > 0
        return known and kernels_have_the_cores(self._threads)

    def run(self, hidden: torch.Tensor) -> Routing:
        """That of `hidden`, [..., hidden size]. Each token gets the bits that it has alone."""
        flat = hidden.reshape(-1, self.columns)
        if len(flat) > 1:
            routing, steps = self.steps(flat.to(self.matrix.inputs).contiguous())
            self._threads.run(steps)
            return routing
        program, own, routing = self._one or self._prepare()
        own.copy_(flat)
        program.run()
        # The next token writes over it.
        return Routing(*(each.clone() for each in routing))

    def steps(self, x: torch.Tensor, slots: tuple[Any, Any] | None = None) -> tuple[Routing, list[Step]]:
        """What will be found for `x`, and the steps that write it.

        `x` is [tokens, hidden size] of the dtype that the matrix multiplies, and may be written by earlier steps.
        `slots` are two arrays of int64: of all experts' slots, and where those of the chosen ones are written.
        """
        # Imported late: importing numba is slow.
        from edgemoe.kernels.cpu import router_kernels
        from edgemoe.kernels.cpu.program import Step

        products, steps = self.matrix.product(Groups.of_one(len(x)), x)
        chosen = torch.empty(len(x), self.top_k, dtype=torch.long)
        routing = Routing(products, chosen.new_empty(chosen.shape, dtype=self.weights_dtype), chosen)
        rounds, halves = (each is torch.bfloat16 for each in (self.dtype, self.weights_dtype))
        words = router_kernels.Words(
            products.data_ptr(), 4 * products.stride(0), self.experts, self.top_k, rounds, self.normalises,
            routing.weights.data_ptr(), halves, chosen.data_ptr(), *(() if slots is None else map(address, slots)),
        )  # fmt: skip
        scratch = router_kernels.scratch_nbytes(self.experts, self.top_k)
        kernel, job = router_kernels.softmax_top_k, Job(words, (routing, slots))
        return routing, [*steps, Step(kernel, job, len(x), products.nbytes, scratch_nbytes=scratch)]

    def _prepare(self) -> tuple[Program, torch.Tensor, Routing]:
        # Later passes may write to its memory in another mode than this one's.
        with torch.inference_mode(False):
            own = torch.empty(1, self.columns, dtype=self.matrix.inputs)
            routing, steps = self.steps(own)
        self._one = self._threads.program(steps), own, routing
        return self._one


def install_routers(
    blocks: Iterable[tuple[nn.Module, int]], threads: KernelThreads, wanted: Callable[[], bool]
) -> None:
    """Replaces the forward of the routers in MoE blocks with so many experts where a `Router` agrees with it.

    It computes whenever `wanted()` and kernels have the cores. The weights must stay where they are.
    """
    for block, experts in blocks:
        for module in block.children():
            router = _of(module, experts, threads)
            if router is not None:
                module.forward = types.MethodType(_forward(module.forward, router, wanted), module)
                vars(module)[_ATTRIBUTE] = router


def router_of(module: nn.Module) -> Router | None:
    """The arithmetic of a router that `install_routers` has found."""
    found: Router | None = vars(module).get(_ATTRIBUTE)
    return found


def _forward(other: Any, router: Router, wanted: Callable[[], bool]) -> Any:
    def forward(module: nn.Module, hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
        if others or named or not router.fits(hidden_states) or not wanted():
            return other(hidden_states, *others, **named)
        products, weights, chosen = router.run(hidden_states)
        return products.to(router.dtype), weights, chosen

    return forward


def _of(module: nn.Module, experts: int, threads: KernelThreads) -> Router | None:
    """The arithmetic of `module`; None where it is no router of a known form, or has no kernel."""
    parameters, top_k = dict(module.named_parameters()), getattr(module, "top_k", None)
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or list(module.buffers()) or type(top_k) is not int:
        return None
    usual = weight.dim() == 2 and len(weight) == experts and weight.dtype in _DTYPES and 0 < top_k <= experts
    if not usual or not has_kernel(weight):
        return None
    # As a plain tensor: other modules may have made more of it.
    router = Router(weight.detach().as_subclass(torch.Tensor), top_k, threads)
    values = torch.randn(PROBED_ROWS, router.columns, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode():
        try:
            found = module(values)
        except Exception as error:
            if is_device_or_memory_error(error):
                raise
            # It wants more than values.
            return None
        return router if _agrees(router, values, found) else None


def _agrees(router: Router, values: torch.Tensor, found: Any) -> bool:
    """Whether `router` gives what its module has `found` for `values`, but for last bits. Sets how it does."""
    shape = len(values), router.top_k
    if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(each, torch.Tensor) for each in found):
        return False
    logits, weights, chosen = found
    known = logits.dtype is router.dtype and weights.dtype in _DTYPES and chosen.dtype is torch.long
    if not known or logits.shape != (len(values), router.experts) or not weights.shape == chosen.shape == shape:
        return False
    router.weights_dtype = weights.dtype
    # Equal scores may be chosen in another order.
    scores = logits.float().gather(1, chosen)
    for router.normalises in (True, False):
        own = router.steps(values.to(router.matrix.inputs))
        KernelThreads(1).run(own[1])
        close = torch.allclose(own[0].weights.float(), weights.float(), rtol=2e-2 if _halves(weights) else 1e-4)
        if close and torch.allclose(own[0].products.gather(1, own[0].chosen), scores, rtol=2e-2, atol=1e-2):
            return True
    return False


def _halves(values: torch.Tensor) -> bool:
    return values.dtype is torch.bfloat16
