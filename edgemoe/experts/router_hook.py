"""Seam 2: what the routers of a transformers model score, read and restricted where they choose.

Nearly every router chooses by `topk` over one score an expert. A torch-function mode around a pass sees that
call inside of a MoE block, so that scores can be hidden before the choice and each family's own normalisation
still applies to what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edgemoe.checkpoint.experts_module import ExpertsModule

TOPK = (torch.topk, torch.Tensor.topk)


class Choice(NamedTuple):
    """A router's scores, float [tokens, experts], as they were before anything was hidden, and how many it takes."""

    scores: torch.Tensor
    top_k: int


class CurrentLayer:
    """The MoE block that a pass is in, which hooks on the model's blocks keep up to date. None between blocks."""

    def __init__(self, model: nn.Module, experts_modules: Sequence[ExpertsModule]) -> None:
        self.layer: int | None = None
        self.experts = [moe.experts for moe in experts_modules]
        for number, moe in enumerate(experts_modules):
            # Where router and experts are called from: the experts' parent, whatever the family calls it.
            block = model.get_submodule(moe.name.rpartition(".")[0])
            block.register_forward_pre_hook(self._entering(number))

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.layer = number

        return enter


class RouterMode(TorchFunctionMode):
    """Within it every router's scores go through `choose`, which gives back those that it chooses by.

    `choose(layer, choice)` is called once a MoE layer and pass, for families whose routers choose by `topk`
    over their experts; the others (phimoe, zaya, hashed layers) choose unseen.
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


def are_logits(scores: torch.Tensor) -> bool:
    """Whether `scores` are logits: probabilities are never negative. What a family has hidden itself tells nothing."""
    return bool(((scores < 0) & (scores > float("-inf"))).any())


def hidden_score(scores: torch.Tensor) -> float:
    """What hides an expert among `scores`: it is chosen last, and only where there are too few others.

    Among probabilities it must not spoil the sum that some families divide by.
    """
    return float("-inf") if are_logits(scores) else -torch.finfo(scores.dtype).tiny


def topk_weights(choice: Choice) -> torch.Tensor:
    """What `choice` would take, float32 [tokens, experts]: the shares of the best, which sum to 1 over those it takes.

    As many again that come next have theirs too: a score that is a little off makes them the chosen ones. Scores are
    probabilities in some families and logits in others.
    """
    scores = choice.scores.float()
    best = scores.topk(min(2 * choice.top_k, scores.shape[-1]), dim=-1)
    values = best.values
    values = (values - values[:, :1]).exp() if are_logits(values) else values.clamp(min=0)
    values = values / values[:, : choice.top_k].sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.zeros_like(scores).scatter(-1, best.indices, values)
