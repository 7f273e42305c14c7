"""Drafters that run passes: the model itself on resident experts, or a second model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from edgemoe.cache import ExpertCache
from edgemoe.experts.draft_routing import DraftRouting, MostSimilar
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.sequential_runner import PassInput
from edgemoe.plan.kv_size import KvSize
from edgemoe.request.request import Request

TRIES = 6
"""Cycles of each rule before one is preferred."""
ANOTHER_EVERY = 48
"""Cycles after which another rule has a turn, since text and resident experts change."""
NEWEST = 0.1
"""Weight of the newest cycle in a rule's tokens and seconds."""


class RuleChoice:
    """Takes turns between rules until each was measured, then mostly the best."""

    def __init__(self, rules: Sequence[str]) -> None:
        self._rules = list(rules)
        self._cycles = dict.fromkeys(rules, 0)
        self._tokens = dict.fromkeys(rules, 0.0)
        self._seconds = dict.fromkeys(rules, 0.0)
        self._turns = 0

    def next(self) -> str:
        """The rule of the next cycle."""
        self._turns += 1
        fewest = min(self._rules, key=lambda rule: self._cycles[rule])
        if self._cycles[fewest] < TRIES or self._turns % ANOTHER_EVERY == 0:
            return fewest
        return self.best

    @property
    def best(self) -> str:
        """The rule that has made most tokens a second so far; the first before anything was measured."""
        return max(self._rules, key=lambda rule: self._tokens[rule] / self._seconds[rule] if self._seconds[rule] else 0)

    def observe(self, rule: str, tokens: int, seconds: float) -> None:
        """A cycle by `rule` gave `tokens` in `seconds`, draft and verification."""
        self._cycles[rule] += 1
        share = max(NEWEST, 1 / self._cycles[rule])
        self._tokens[rule] += share * (tokens - self._tokens[rule])
        self._seconds[rule] += share * (seconds - self._seconds[rule])


class Branch(NamedTuple):
    """Nodes of one sequence's tree that are to be run, in the order of their numbers."""

    request: Request
    tree: DraftTree
    nodes: Sequence[int]


class PassDrafter(ABC):
    """Runs nodes of draft trees and gives what may follow them. From `begin` to `end` one cycle; nothing in between.

    `wanted[layer]`, after a run, are the shares that each of its nodes, in their order, gave the target's
    experts, float32 [nodes, experts]; empty where the drafter cannot tell.
    """

    predicts_experts = False
    """Whether its routing is the target's, so that `wanted` says something."""

    def __init__(self, runner: ModelRunner) -> None:
        self.wanted: list[torch.Tensor] = []
        self._runner = runner
        self._run: dict[Request, list[int]] = {}
        self._base: dict[Request, int] = {}

    def takes(self, request: Request) -> bool:
        """Whether it can draft for `request` now."""
        return True

    def forget(self, request: Request) -> None:  # noqa: B027
        """`request` is over, or has lost its place."""

    def observe(self, tokens: int, seconds: float) -> None:  # noqa: B027
        """The last cycle gave `tokens` in `seconds`, draft and verification."""

    def begin(self, requests: Sequence[Request]) -> None:
        """Starts a cycle: the pasts stand before each one's last token. `end` has to follow, even where this raises."""
        self._run, self._base = {}, {}
        self._catch_up(requests)
        for request in requests:
            cache = self._cache_of(request)
            cache.mark()
            self._run[request], self._base[request] = [], cache.tokens

    def run(self, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """The logits after each of the nodes, float32 [nodes, vocabulary] a branch. Parents have been run before."""
        work = [
            self._known(
                tree_input(self._cache_of(branch.request), branch.tree, branch.nodes, self._run[branch.request])
            )
            for branch in branches
        ]
        with self._drafting():
            logits = self._runner.run(work)
        for branch in branches:
            self._run[branch.request] += branch.nodes
        return logits

    def end(self) -> None:
        """Ends the cycle: the pasts are again as they were."""
        bases, self._run, self._base = self._base, {}, {}
        for request, base in bases.items():
            self._cache_of(request).rollback(base)

    def _catch_up(self, requests: Sequence[Request]) -> None:  # noqa: B027
        """Lets the pasts have all that was committed but the last token of each."""

    def _known(self, work: PassInput) -> PassInput:
        """`work` with such tokens only as the model that is run knows."""
        return work

    def _drafting(self) -> AbstractContextManager[None]:
        return nullcontext()

    @abstractmethod
    def _cache_of(self, request: Request) -> SequenceCache:
        """The past that this drafter appends to."""


class SelfDrafter(PassDrafter):
    """The target model, its weights and its keys and values, routed among resident experts (SpecMoE)."""

    predicts_experts = True

    def __init__(
        self,
        runner: ModelRunner,
        cache: ExpertCache,
        experts: Sequence[int],
        rules: Sequence[str],
        most_similar: MostSimilar | None,
    ) -> None:
        """`experts[layer]` is how many experts a layer has; of several `rules` the best is found by measuring.

        `most_similar` serves the rule "affinity".
        """
        super().__init__(runner)
        self._cache = cache
        self._experts = experts
        self._choice = RuleChoice(rules)
        self._rule = rules[0]
        self._most_similar = most_similar
        self._layers: ExpertLayers = runner.sequential.layers

    def begin(self, requests: Sequence[Request]) -> None:
        """See the base class."""
        super().begin(requests)
        self._rule = self._choice.next()

    def observe(self, tokens: int, seconds: float) -> None:
        """See the base class."""
        self._choice.observe(self._rule, tokens, seconds)

    def run(self, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """See the base class."""
        self._routing = DraftRouting(self._cache, self._experts, self._rule, self._most_similar)
        logits = super().run(branches)
        self.wanted = [torch.cat(shares) if shares else torch.zeros(0, 0) for shares in self._routing.wanted]
        return logits

    def _drafting(self) -> AbstractContextManager[None]:
        return self._layers.overriding(self._routing)

    def _cache_of(self, request: Request) -> SequenceCache:
        assert request.cache is not None
        return request.cache


class ModelDrafter(PassDrafter):
    """A second model with the same tokens, which has pasts of its own within a room of their own.

    How many rows a checkpoint has beyond its tokenizer's tokens is its own affair: logits are given for those of the
    target, and a token that this model has no row for is read as its last one.
    """

    def __init__(self, runner: ModelRunner, vocabulary: int, kv: KvSize, room_nbytes: int, chunk: int) -> None:
        """`vocabulary` is the target's. `chunk` bounds the tokens of a pass that reads what it has not seen yet."""
        super().__init__(runner)
        self._vocabulary = vocabulary
        self._own_vocabulary = runner.vocabulary
        self._kv = kv
        self._room_nbytes = room_nbytes
        self._chunk = chunk
        self._caches: dict[Request, SequenceCache] = {}

    def takes(self, request: Request) -> bool:
        """See the base class: whether its past, at its longest, fits beside the others."""
        if request in self._caches:
            return True
        taken = sum(self._kv.nbytes(cache.capacity) for cache in self._caches.values())
        if taken + self._kv.nbytes(request.max_length) > self._room_nbytes:
            return False
        self._caches[request] = self._runner.start(request.max_length)
        return True

    def forget(self, request: Request) -> None:
        """See the base class."""
        self._caches.pop(request, None)

    def run(self, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """See the base class."""
        more = self._vocabulary - self._own_vocabulary
        logits = super().run(branches)
        return [torch.nn.functional.pad(each, (0, more), value=float("-inf")) for each in logits] if more else logits

    def _known(self, work: PassInput) -> PassInput:
        last = self._own_vocabulary - 1
        return work._replace(tokens=[min(token, last) for token in work.tokens])

    def _catch_up(self, requests: Sequence[Request]) -> None:
        for request in requests:
            cache = self._caches[request]
            while cache.tokens < len(request.tokens) - 1:
                end = min(cache.tokens + self._chunk, len(request.tokens) - 1)
                self._runner.run([self._known(PassInput(cache, request.tokens[cache.tokens : end]))])

    def _cache_of(self, request: Request) -> SequenceCache:
        return self._caches[request]
