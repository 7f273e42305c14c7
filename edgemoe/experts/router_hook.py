"""Seam 2: the scores of a transformers model's routers, read and changed before the top-k.

Nearly every router calls `topk` on one score per expert. A torch-function mode around a pass intercepts that call
inside of a MoE block. Scores can be hidden there, and each family's own normalisation still applies to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edgemoe.cache import accelerator
from edgemoe.checkpoint.experts_module import ExpertsModule

TOPK = (torch.topk, torch.Tensor.topk)


class Choice(NamedTuple):
    """A router's call of `topk`."""

    scores: torch.Tensor
    """Float [tokens, experts]: probabilities, or logits in some families, before any is hidden."""
    top_k: int


class CurrentLayer:
    """The MoE layer whose router has not chosen yet in the running pass."""

    def __init__(self, model: nn.Module, experts_modules: Sequence[ExpertsModule]) -> None:
        """Registers a hook on every MoE block of `model`."""
        self.layer: int | None = None
        """Set when a pass enters a MoE block, None once its router has chosen."""
        self.experts = [moe.experts for moe in experts_modules]
        for number, moe in enumerate(experts_modules):
            moe.block(model).register_forward_pre_hook(self._entering(number))

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.layer = number

        return enter


class RouterMode(TorchFunctionMode):
    """In this mode every router takes its top-k of the scores that `choose` returns.

    `choose(layer, choice)` is called once per MoE layer and pass, and returns scores of the same shape and dtype. It is
    not called for routers that do not choose by `topk` over their experts (phimoe, zaya, hashed layers).
    """

    def __init__(self, current: CurrentLayer, choose: Callable[[int, Choice], torch.Tensor]) -> None:
        super().__init__()
        self._current = current
        self._choose = choose

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See PyTorch's TorchFunctionMode."""
        kwargs = kwargs or {}
        if func in TOPK and self._current.layer is not None and args:
            layer, scores = self._current.layer, args[0]
            if scores.dim() == 2 and scores.shape[-1] == self._current.experts[layer]:
                top_k = int(kwargs["k"] if "k" in kwargs else args[1])
                self._current.layer = None
                args = (self._choose(layer, Choice(scores, top_k)), *args[1:])
        return func(*args, **kwargs)


def by_kind(
    scores: torch.Tensor, logits: Callable[[], torch.Tensor], probabilities: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """`logits()` where `scores` are logits, else `probabilities()`; both of one shape and dtype.

    Scores are logits where some are negative. An expert that the family has hidden by -inf does not count. On a device
    both are computed, so that the host need not wait.
    """
    negative = ((scores < 0) & (scores > float("-inf"))).any()
    if not accelerator.is_accelerator(scores.device):
        return logits() if bool(negative) else probabilities()
    return torch.where(negative, logits(), probabilities())


def hide(scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`scores` with the experts at `hidden`, bool [tokens, experts] or [experts], hidden from the top-k.

    The top-k takes them last, only when too few others are left. Among probabilities the score that hides is too small
    to change the sum that some families divide by.
    """
    tiny = -torch.finfo(scores.dtype).tiny
    return by_kind(
        scores,
        lambda: scores.masked_fill(hidden, float("-inf")),
        lambda: scores.masked_fill(hidden, tiny),
    )


def topk_weights(choice: Choice) -> torch.Tensor:
    """The routing weights of `choice`, float32 [tokens, experts], normalised to a sum of 1 over the top-k.

    The top-k runners-up have weights on the same scale, since a small error in the scores would make them the chosen
    ones. All other experts have the weight 0.
    """
    scores = choice.scores.float()
    best = scores.topk(min(2 * choice.top_k, scores.shape[-1]), dim=-1)
    raw = best.values
    values = by_kind(raw, lambda: (raw - raw[:, :1]).exp(), lambda: raw.clamp(min=0))
    values = values / values[:, : choice.top_k].sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.zeros_like(scores).scatter(-1, best.indices, values)
