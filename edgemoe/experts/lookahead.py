"""Predicts the experts of the next layer: the next layer's router applied to the input of this layer's experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.prefetch.router_map import RouterMap

MAX_RANKS = 8
"""Cap on the experts that are predicted per token."""
MAX_PREDICTED_TOKENS = 64
"""A pass of more tokens is not predicted: it needs most experts anyway."""
MAX_LEARNT_TOKENS = 512
"""Cap on the tokens of one pass that the maps are trained on."""


class RouterScores(NamedTuple):
    """What two routers say of the tokens that enter the experts of one layer, float32 [tokens, experts] on the CPU.

    None where it was not computed.
    """

    own: torch.Tensor | None
    """By the router of the layer itself."""
    following: torch.Tensor | None
    """By the router of the layer after it."""


class Lookahead:
    """Predicts the experts of a layer from the hidden states that enter the experts of the layer before it.

    A layer changes the residual stream little, so the next router's input resembles this one's (mixtral-offloading,
    arXiv 2312.17238, section 3.2). A linear map, trained on the scores that the next router then computes, corrects for
    the average change. A router is recognised by its shape, [experts, hidden size], next to the experts; a layer with
    another kind of router is not predicted.
    """

    def __init__(self, model: nn.Module, experts_modules: Sequence[ExpertsModule]) -> None:
        self._routers = [_router(model, moe) for moe in experts_modules]
        self._experts = [moe.experts for moe in experts_modules]
        self._maps = [
            RouterMap(self._experts[layer - 1] + self._experts[layer], self._experts[layer])
            if layer and self.can_predict(layer)
            else None
            for layer in range(len(experts_modules))
        ]
        self._biases: dict[int, torch.Tensor] = {}
        """Correction biases on the host, where predictions are made."""
        self._features: list[torch.Tensor | None] = [None] * len(experts_modules)

    def can_predict(self, layer: int) -> bool:
        """Whether `layer` and the layer before it have routers of the known kind."""
        return 0 < layer < len(self._routers) and None not in self._routers[layer - 1 : layer + 1]

    def ranks(self, layer: int, top_k: int) -> int:
        """How many experts of `layer` are predicted per token, of which the router will choose `top_k`."""
        return min(self._experts[layer], MAX_RANKS, 2 * top_k)

    def learns(self, layer: int) -> bool:
        """Whether the next `enter_layer` of `layer` trains its map."""
        return self._features[layer] is not None

    def queue_scores(self, layer: int, hidden: torch.Tensor, *, following: bool) -> list[torch.Tensor]:
        """The scores of `hidden` by the router of `layer`, and by the following one, on the device of `hidden`.

        As `RouterScores` has them, in the model's dtype, of `MAX_LEARNT_TOKENS` tokens at most. The host waits for
        nothing. `layer` has a router of the known kind.
        """
        layers = (layer, layer + 1) if following else (layer,)
        return [self._device_scores(each, hidden[:MAX_LEARNT_TOKENS]) for each in layers]

    def predict(
        self, layer: int, hidden: torch.Tensor, top_k: int, scores: RouterScores | None = None
    ) -> dict[int, int]:
        """The predicted experts of `layer`, each with its best rank over the tokens, from 0.

        `hidden`, [tokens, hidden size], enters the experts of the layer before. More than `MAX_PREDICTED_TOKENS` tokens
        predict no expert. Keeps the router's features for the next `enter_layer` of `layer` to train on. `scores` are
        those of `queue_scores` for the layer before, where they were.
        """
        features = self._observed(layer, hidden[:MAX_LEARNT_TOKENS], scores)
        if len(hidden) > MAX_PREDICTED_TOKENS:
            return {}
        router_map = self._maps[layer]
        assert router_map is not None
        expected = self._corrected(layer, router_map.scores(features))
        ranks: dict[int, int] = {}
        for row in expected.topk(self.ranks(layer, top_k), dim=-1).indices.tolist():
            for rank, expert in enumerate(row):
                ranks[expert] = min(rank, ranks.get(expert, rank))
        return ranks

    def enter_layer(self, layer: int, hidden: torch.Tensor, own: torch.Tensor | None = None) -> None:
        """A pass enters the experts of `layer` with `hidden`, [tokens, hidden size]: trains the layer's map on it.

        Without a `predict` for `layer` since the last call, or for another number of tokens, nothing is trained. `own`
        are the scores of the layer's router, where they were computed.
        """
        features, self._features[layer] = self._features[layer], None
        router_map = self._maps[layer]
        if features is not None and router_map is not None and len(features) == min(len(hidden), MAX_LEARNT_TOKENS):
            router_map.learn(features, self._scores(layer, hidden[:MAX_LEARNT_TOKENS]) if own is None else own)

    def _observed(self, layer: int, hidden: torch.Tensor, scores: RouterScores | None) -> torch.Tensor:
        """The scores of `hidden` by the router before and by that of `layer`; kept until `enter_layer`."""
        own, following = scores or (None, None)
        before = self._scores(layer - 1, hidden) if own is None else own
        features = torch.cat([before, self._scores(layer, hidden) if following is None else following], dim=1)
        self._features[layer] = features
        return features

    def _scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self._device_scores(layer, hidden).float().cpu()

    def _device_scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        router = self._routers[layer]
        assert router is not None
        weight = router[0]
        return hidden.to(weight.dtype) @ weight.t()

    def _corrected(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """`scores` with the family's own correction bias, where it has one (DeepSeek-V3 and its relatives)."""
        router = self._routers[layer]
        assert router is not None
        bias = router[1]
        if bias is None:
            return scores
        if layer not in self._biases:
            self._biases[layer] = bias.float().cpu()
        return scores.sigmoid() + self._biases[layer]


def _router(model: nn.Module, moe: ExpertsModule) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The router's weight, [experts, hidden size], and its correction bias; None for a router of another kind."""
    block, name = moe.block(model), moe.name.rpartition(".")[2]
    hidden = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    if _width(model, moe) != hidden:
        # The experts' input is not the router's (Nemotron's latent experts).
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
    """The width of the experts' input and output."""
    down = next(part for part in moe.layout.parts if part.name == "down_proj")
    return down.shape[-1 if moe.module(model).is_transposed else -2]
