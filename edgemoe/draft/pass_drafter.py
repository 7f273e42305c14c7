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
from edgemoe.model.pass_logits import LogitsRows, on_host
from edgemoe.model.sequential_runner import PassInput
from edgemoe.plan.kv_size import KvSize
from edgemoe.request.request import Request

TRIES = 6
"""Cycles for which each rule is measured before the best is used."""
ANOTHER_EVERY = 48
"""Cycles after which another rule is measured again: text and resident experts change."""
NEWEST = 0.1
"""Weight of the newest cycle in a rule's averages."""


class RuleChoice:
    """Chooses the rule of each cycle: every rule in turn until it is measured, then mostly the best."""

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
        """The rule with the most tokens a second so far; the first rule before any was measured."""
        return max(self._rules, key=lambda rule: self._tokens[rule] / self._seconds[rule] if self._seconds[rule] else 0)

    def observe(self, rule: str, tokens: int, seconds: float) -> None:
        """A cycle by `rule` gave `tokens` in `seconds`, draft and verification."""
        self._cycles[rule] += 1
        share = max(NEWEST, 1 / self._cycles[rule])
        self._tokens[rule] += share * (tokens - self._tokens[rule])
        self._seconds[rule] += share * (seconds - self._seconds[rule])


class Branch(NamedTuple):
    """Nodes of one sequence's tree to run, in ascending order."""

    request: Request
    tree: DraftTree
    nodes: Sequence[int]


class PassDrafter(ABC):
    """Runs nodes of draft trees. A cycle is `begin`, runs, `end`, with no other pass in between.

    `wanted[layer]`, after a run, are the shares that each of its nodes, in their order, gave the target's
    experts, float32 [nodes, experts]; empty where the drafter cannot tell.
    """

    name: str
    """What settings and reports call it."""
    takes_over = False
    """Whether n-grams leave what is not likely to it in trees, as they do in chains: it is right more often."""
    predicts_experts = False
    """Whether the drafter routes as the target does, so that `wanted` predicts its experts."""

    def __init__(self, runner: ModelRunner) -> None:
        self.wanted: list[torch.Tensor] = []
        self._runner = runner
        self._run: dict[Request, list[int]] = {}
        self._base: dict[Request, int] = {}

    def takes(self, request: Request) -> bool:
        """Whether the drafter can draft for `request` now."""
        return True

    def can_run(self, request: Request, tree: DraftTree, node: int) -> bool:
        """Whether the next run may have `node` of `tree`, whose children it proposes."""
        return True

    def forget(self, request: Request) -> None:  # noqa: B027
        """Drops the state of a finished or preempted request."""

    def observe(self, tokens: int, seconds: float) -> None:  # noqa: B027
        """The last cycle gave `tokens` in `seconds`, draft and verification."""

    def begin(self, requests: Sequence[Request]) -> None:
        """Starts a cycle: KV caches hold all but each request's last token. `end` must follow, also after an error."""
        self._run, self._base = {}, {}
        self._catch_up(requests)
        for request in requests:
            cache = self._cache_of(request)
            cache.mark()
            self._run[request], self._base[request] = [], cache.tokens

    def run(self, branches: Sequence[Branch]) -> list[LogitsRows]:
        """The logits after each node, a row each, for each branch. Parents are run before children."""
        work = [
            self._known(
                tree_input(self._cache_of(branch.request), branch.tree, branch.nodes, self._run[branch.request])
            )
            for branch in branches
        ]
        with self._drafting():
            logits = self._runner.run_sampled(work)
        for branch in branches:
            self._run[branch.request] += branch.nodes
        return logits

    def end(self) -> None:
        """Ends the cycle and rolls the KV caches back to its beginning."""
        bases, self._run, self._base = self._base, {}, {}
        for request, base in bases.items():
            self._cache_of(request).rollback(base)

    def _catch_up(self, requests: Sequence[Request]) -> None:  # noqa: B027
        """Appends committed tokens that KV caches lack, except for each request's last one."""

    def _known(self, work: PassInput) -> PassInput:
        """`work` with token ids that the drafting model has."""
        return work

    def _drafting(self) -> AbstractContextManager[None]:
        return nullcontext()

    @abstractmethod
    def _cache_of(self, request: Request) -> SequenceCache:
        """The KV cache that this drafter appends to."""


class SelfDrafter(PassDrafter):
    """Drafts with the target model and its KV caches, routed among resident experts (SpecMoE)."""

    name = "self"
    predicts_experts = True

    def __init__(
        self,
        runner: ModelRunner,
        cache: ExpertCache,
        experts: Sequence[int],
        rules: Sequence[str],
        most_similar: MostSimilar | None,
    ) -> None:
        """`experts[layer]` is the number of a layer's experts. The best of several `rules` is found by measuring.

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

    def run(self, branches: Sequence[Branch]) -> list[LogitsRows]:
        """See the base class."""
        self._routing = DraftRouting(self._cache, self._experts, self._rule, self._most_similar)
        logits = super().run(branches)
        self.wanted = self._routing.wanted_on_host()
        return logits

    def _drafting(self) -> AbstractContextManager[None]:
        return self._layers.overriding(self._routing)

    def _cache_of(self, request: Request) -> SequenceCache:
        assert request.cache is not None
        return request.cache


class ModelDrafter(PassDrafter):
    """Drafts with a second model of the same vocabulary, which has KV caches of its own within a budget of its own.

    How many rows a checkpoint has beyond its tokenizer's tokens is its own affair: logits are given for those of the
    target, and a token that this model has no row for is read as its last one.
    """

    name = "model"

    def __init__(self, runner: ModelRunner, vocabulary: int, kv: KvSize, room_nbytes: int, chunk: int) -> None:
        """`vocabulary` is the target's. `chunk` bounds the tokens of a pass that catches up with committed tokens."""
        super().__init__(runner)
        self._vocabulary = vocabulary
        self._own_vocabulary = runner.vocabulary
        self._kv = kv
        self._room_nbytes = room_nbytes
        self._chunk = chunk
        self._caches: dict[Request, SequenceCache] = {}

    def takes(self, request: Request) -> bool:
        """See the base class: whether its KV cache, at full length, fits the budget beside the others."""
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

    def run(self, branches: Sequence[Branch]) -> list[LogitsRows]:
        """See the base class."""
        more = self._vocabulary - self._own_vocabulary
        logits = super().run(branches)
        if not more:
            return logits
        return [torch.nn.functional.pad(on_host(each), (0, more), value=float("-inf")) for each in logits]

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
