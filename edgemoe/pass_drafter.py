"""Drafters that run a model: the target itself with what is resident, or a second, smaller one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from edgemoe.cache import ExpertCache
from edgemoe.decoder import Work
from edgemoe.draft_routing import DraftRouting, Nearest
from edgemoe.draft_tree import DraftTree
from edgemoe.expert_layer import ExpertLayers
from edgemoe.generation import Generation
from edgemoe.joint_decoder import JointDecoder, tree_work
from edgemoe.kv_size import KvSize
from edgemoe.past import Past
from edgemoe.rule_choice import RuleChoice


class Branch(NamedTuple):
    """Nodes of one sequence's tree that are to be run, in the order of their numbers."""

    generation: Generation
    tree: DraftTree
    nodes: Sequence[int]


class PassDrafter(ABC):
    """Runs nodes of draft trees and gives what may follow them. From `begin` to `end` one cycle; nothing in between.

    `wanted[layer]`, after a run, are the shares that each of its nodes, in their order, gave the target's
    experts, float32 [nodes, experts]; empty where the drafter cannot tell.
    """

    foretells = False
    """Whether its routing is the target's, so that `wanted` says something."""

    def __init__(self, decoder: JointDecoder) -> None:
        self.wanted: list[torch.Tensor] = []
        self._decoder = decoder
        self._run: dict[Generation, list[int]] = {}
        self._base: dict[Generation, int] = {}

    def takes(self, generation: Generation) -> bool:
        """Whether it can draft for `generation` now."""
        return True

    def forget(self, generation: Generation) -> None:  # noqa: B027
        """`generation` is over, or has lost its place."""

    def saw(self, tokens: int, seconds: float) -> None:  # noqa: B027
        """The last cycle gave `tokens` in `seconds`, draft and verification."""

    def begin(self, generations: Sequence[Generation]) -> None:
        """Starts a cycle: the pasts stand before each one's last token. `end` has to follow, even where this raises."""
        self._run, self._base = {}, {}
        self._catch_up(generations)
        for generation in generations:
            past = self._past(generation)
            past.draft()
            self._run[generation], self._base[generation] = [], past.tokens

    def run(self, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """The logits after each of the nodes, float32 [nodes, vocabulary] a branch. Parents have been run before."""
        work = [
            self._known(
                tree_work(self._past(branch.generation), branch.tree, branch.nodes, self._run[branch.generation])
            )
            for branch in branches
        ]
        with self._drafting():
            logits = self._decoder.run(work)
        for branch in branches:
            self._run[branch.generation] += branch.nodes
        return logits

    def end(self) -> None:
        """Ends the cycle: the pasts are again as they were."""
        bases, self._run, self._base = self._base, {}, {}
        for generation, base in bases.items():
            self._past(generation).keep(base)

    def _catch_up(self, generations: Sequence[Generation]) -> None:  # noqa: B027
        """Lets the pasts have all that was committed but the last token of each."""

    def _known(self, work: Work) -> Work:
        """`work` with such tokens only as the model that is run knows."""
        return work

    def _drafting(self) -> AbstractContextManager[None]:
        return nullcontext()

    @abstractmethod
    def _past(self, generation: Generation) -> Past:
        """The past that this drafter appends to."""


class SelfDrafter(PassDrafter):
    """The target model, its weights and its keys and values, routed among resident experts (SpecMoE)."""

    foretells = True

    def __init__(
        self,
        decoder: JointDecoder,
        cache: ExpertCache,
        experts: Sequence[int],
        rules: Sequence[str],
        nearest: Nearest | None,
    ) -> None:
        """`experts[layer]` is how many experts a layer has; of several `rules` the best is found by measuring.

        `nearest` serves the rule "affinity".
        """
        super().__init__(decoder)
        self._cache = cache
        self._experts = experts
        self._choice = RuleChoice(rules)
        self._rule = rules[0]
        self._nearest = nearest
        self._layers: ExpertLayers = decoder.plain.layers

    def begin(self, generations: Sequence[Generation]) -> None:
        """See the base class."""
        super().begin(generations)
        self._rule = self._choice.next()

    def saw(self, tokens: int, seconds: float) -> None:
        """See the base class."""
        self._choice.saw(self._rule, tokens, seconds)

    def run(self, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """See the base class."""
        self._routing = DraftRouting(self._cache, self._experts, self._rule, self._nearest)
        logits = super().run(branches)
        self.wanted = [torch.cat(shares) if shares else torch.zeros(0, 0) for shares in self._routing.wanted]
        return logits

    def _drafting(self) -> AbstractContextManager[None]:
        return self._layers.drafting(self._routing)

    def _past(self, generation: Generation) -> Past:
        assert generation.past is not None
        return generation.past


class ModelDrafter(PassDrafter):
    """A second model with the same tokens, which has pasts of its own within a room of their own.

    How many rows a checkpoint has beyond its tokenizer's tokens is its own affair: logits are given for those of the
    target, and a token that this model has no row for is read as its last one.
    """

    def __init__(self, decoder: JointDecoder, vocabulary: int, kv: KvSize, room_nbytes: int, chunk: int) -> None:
        """`vocabulary` is the target's. `chunk` bounds the tokens of a pass that reads what it has not seen yet."""
        super().__init__(decoder)
        self._vocabulary = vocabulary
        self._own_vocabulary = decoder.vocabulary
        self._kv = kv
        self._room_nbytes = room_nbytes
        self._chunk = chunk
        self._pasts: dict[Generation, Past] = {}

    def takes(self, generation: Generation) -> bool:
        """See the base class: whether its past, at its longest, fits beside the others."""
        if generation in self._pasts:
            return True
        taken = sum(self._kv.nbytes(past.room) for past in self._pasts.values())
        if taken + self._kv.nbytes(generation.most_tokens) > self._room_nbytes:
            return False
        self._pasts[generation] = self._decoder.start(generation.most_tokens)
        return True

    def forget(self, generation: Generation) -> None:
        """See the base class."""
        self._pasts.pop(generation, None)

    def run(self, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """See the base class."""
        more = self._vocabulary - self._own_vocabulary
        logits = super().run(branches)
        return [torch.nn.functional.pad(each, (0, more), value=float("-inf")) for each in logits] if more else logits

    def _known(self, work: Work) -> Work:
        last = self._own_vocabulary - 1
        return work._replace(tokens=[min(token, last) for token in work.tokens])

    def _catch_up(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            past = self._pasts[generation]
            while past.tokens < len(generation.tokens) - 1:
                end = min(past.tokens + self._chunk, len(generation.tokens) - 1)
                self._decoder.run([self._known(Work(past, generation.tokens[past.tokens : end]))])

    def _past(self, generation: Generation) -> Past:
        return self._pasts[generation]
