"""Passes of a model on a card that is not there; see `fake_card`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from bench.support.no_card.fake_card import DEVICE, Counts, FakeCapturer, FakeCard, OnFakeCard
from edgemoe.checkpoint.experts_module import ExpertsModule, find_experts_modules, release_weights
from edgemoe.experts.draft_routing import DraftRouting
from edgemoe.experts.grouped_layer import GroupedLayer
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.sequential_runner import PassInput, SequentialRunner


def without_weights(chosen: Any) -> tuple[Any, list[ExpertsModule]]:
    """The model of a transformers configuration in bf16, on the meta device, and its experts modules."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(chosen, dtype=torch.bfloat16)
    modules = find_experts_modules(model)
    for moe in modules:
        release_weights(moe, model)
    return model, modules


class FakePasses:
    """Passes over one sequence. To be used inside of `card.running()`."""

    def __init__(self, card: FakeCard, own: OnFakeCard, context: int) -> None:
        """Of the model that `put_on` put on `card`; `context` bounds the tokens of the sequence.

        What passes can be is probed by comparing values, of which there are none: all that a model's code runs counts
        as right.
        """
        from edgemoe.model.pass_graph import DevicePasses

        self._card, self._own = card, own
        passes = DevicePasses(self._own.tools, FakeCapturer(card), context)
        sequential = SequentialRunner(self._own.model, self._own.layers, DEVICE, 1000, 1, 1, device_passes=passes)
        alike = mock.patch.object(SequentialRunner, "agree", return_value=True)
        with alike, mock.patch.object(SequentialRunner, "_chunks_agree", return_value=True):
            self._runner = ModelRunner(sequential)
        self._cache = self._runner.start(context)

    @property
    def refusal(self) -> str:
        """Why passes are not captured; empty where they are."""
        return self._runner.graph_refusal

    @property
    def verifies(self) -> str:
        """See `ModelRunner`."""
        return self._runner.verifies

    @property
    def captured(self) -> int:
        """Operations and kernels in graphs so far."""
        return self._card.captured

    @property
    def has_kernels(self) -> bool:
        """Whether kernels of the card compute all experts: others are read by the host, which finds no values."""
        return all(isinstance(layer, GroupedLayer) for layer in self._own.layers.layers)

    def prompt(self, tokens: int) -> Counts:
        """A pass of so many tokens."""
        return self._counted([PassInput(self._cache, [1] * tokens)])

    def decode(self) -> Counts:
        """A pass of one token."""
        return self._counted([PassInput(self._cache, [1])])

    def together(self, sequences: int) -> Counts:
        """A step of several new sequences."""
        caches = [self._runner.start(64) for _ in range(sequences)]
        return self._counted([PassInput(cache, [1, 2, 3]) for cache in caches])

    def verify(self) -> Counts:
        """A pass over a draft of three tokens and the token before it, which is taken back."""
        tree, node = DraftTree(1), 0
        for token in (2, 3, 4):
            node = tree.add(node, token, 1.0)
        base = self._cache.tokens
        self._cache.mark()
        found = self._counted([tree_input(self._cache, tree, range(len(tree)), ())])
        self._cache.rollback(base, [0])
        return found

    def draft(self) -> Counts:
        """A pass of one token among resident experts, and what its routing says of the verification."""
        routing = DraftRouting(self._own.cache, self._own.cache.store.experts, "reselect")
        base = self._cache.tokens
        self._cache.mark()

        def run() -> None:
            with self._own.layers.overriding(routing):
                self._runner.run_on_device([PassInput(self._cache, [1])])

        found = self._card.counted(run)
        self._cache.rollback(base)
        return found

    def _counted(self, inputs: Sequence[PassInput]) -> Counts:
        return self._card.counted(lambda: self._runner.run_on_device(inputs))
