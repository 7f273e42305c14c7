"""The next layer's router applied to this layer's input: which experts a pass will want next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.prefetch.router_map import RouterMap

RANKS = 8
"""Experts that are named for a token at most, by rank."""
MAX_TOKENS = 64
"""Tokens of a pass beyond which nothing is foretold: it wants most experts anyway."""
MAX_LEARNT = 512
"""Tokens of one pass that the maps learn from at most."""


class Lookahead:
    """Names the experts of a layer from the hidden states that enter the experts of the layer before it.

    What a layer adds to the residual stream is small beside what is there, so that the next router mostly sees what
    this one saw (mixtral-offloading, arXiv 2312.17238, section 3.2). What it adds on the average is learnt: a linear
    map corrects the next router's scores by what they turned out to be. Routers are recognised by their shape,
    [experts, hidden size], beside the experts; layers whose router looks different are not foretold.
    """

    def __init__(self, model: nn.Module, experts_modules: Sequence[ExpertsModule]) -> None:
        self._routers = [_router(model, moe) for moe in experts_modules]
        self._experts = [moe.experts for moe in experts_modules]
        self._maps = [
            RouterMap(self._experts[layer - 1] + self._experts[layer], self._experts[layer])
            if layer and self.names(layer)
            else None
            for layer in range(len(experts_modules))
        ]
        self._features: list[torch.Tensor | None] = [None] * len(experts_modules)

    def names(self, layer: int) -> bool:
        """Whether the experts of `layer` can be foretold."""
        return 0 < layer < len(self._routers) and None not in self._routers[layer - 1 : layer + 1]

    def ranks(self, layer: int, top_k: int) -> int:
        """Experts of `layer` that are named for each token, whose own choice are `top_k`."""
        return min(self._experts[layer], RANKS, 2 * top_k)

    def predict(self, layer: int, hidden: torch.Tensor, top_k: int) -> dict[int, int]:
        """The experts of `layer` that `hidden`, [tokens, hidden size], of the layer before will want.

        With each one's best rank, from 0. Many tokens are learnt from, and nothing is said of them.
        """
        features = self._observed(layer, hidden[:MAX_LEARNT])
        if len(hidden) > MAX_TOKENS:
            return {}
        router_map = self._maps[layer]
        assert router_map is not None
        scores = self._corrected(layer, router_map.scores(features))
        ranks: dict[int, int] = {}
        for row in scores.topk(self.ranks(layer, top_k), dim=-1).indices.tolist():
            for rank, expert in enumerate(row):
                ranks[expert] = min(rank, ranks.get(expert, rank))
        return ranks

    def enter_layer(self, layer: int, hidden: torch.Tensor) -> None:
        """`layer` was reached with `hidden`: what was foretold from the layer before is learnt from."""
        features, self._features[layer] = self._features[layer], None
        router_map = self._maps[layer]
        if features is not None and router_map is not None and len(features) == min(len(hidden), MAX_LEARNT):
            router_map.learn(features, self._scores(layer, hidden[:MAX_LEARNT]))

    def _observed(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the router before and that of `layer` make of `hidden`; kept until `layer` is reached."""
        features = torch.cat([self._scores(layer - 1, hidden), self._scores(layer, hidden)], dim=1)
        self._features[layer] = features
        return features

    def _scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        router = self._routers[layer]
        assert router is not None
        weight = router[0]
        return (hidden.to(weight.dtype) @ weight.t()).float().cpu()

    def _corrected(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """By what the family itself corrects its choice, where it does (DeepSeek-V3 and its relatives)."""
        router = self._routers[layer]
        assert router is not None
        bias = router[1]
        return scores if bias is None else scores.sigmoid() + bias.float().cpu()


def _router(model: nn.Module, moe: ExpertsModule) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The router's weight, and the bias that corrects its choice where the family has one."""
    path, _, name = moe.name.rpartition(".")
    block = model.get_submodule(path)
    hidden = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    if _width(model, moe) != hidden:
        # The experts see something narrower than the router (Nemotron's latent experts).
        return None
    found = {
        key: value
        for key, value in [*block.named_parameters(), *block.named_buffers()]
        if not key.startswith(f"{name}.") and value is not None and value.shape[:1] == (moe.experts,)
    }
    weights = [value for value in found.values() if tuple(value.shape) == (moe.experts, hidden)]
    biases = [value for key, value in found.items() if value.dim() == 1 and "correction" in key]
    if len(weights) != 1:
        return None
    return weights[0], biases[0] if biases else None


def _width(model: nn.Module, moe: ExpertsModule) -> int:
    """How wide what enters and leaves the experts is."""
    down = next(part for part in moe.layout.parts if part.name == "down_proj")
    return down.shape[-1 if moe.module(model).is_transposed else -2]
