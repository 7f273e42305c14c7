"""Drafts with the checkpoint's own head (multi-token prediction), which reads the model's hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from edgemoe.draft.pass_drafter import Branch, PassDrafter, RuleChoice
from edgemoe.experts.head_experts import HeadExperts
from edgemoe.model.draft_tree import DraftTree, TreeMask
from edgemoe.model.head_cache import HeadCache
from edgemoe.model.head_runner import AFTER, BEFORE, HeadInput, HeadOutput, HeadRunner
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.pass_logits import LogitsRows, on_host
from edgemoe.request.request import Request

USUAL_DEPTH = 3
"""Most tokens that are drafted one after the other where nothing prices them. The head is trained for the first; the
others are made of its own hidden states, and are right less often."""
MIN_TRIAL_ROWS = 16
"""Rows from which the two kinds of hidden states are compared on a text."""
ROUTINGS = ("resident", "all")
"""Which experts the head's passes compute where some are missing: those that are resident, or all that it chooses."""
KINDS = {"after": AFTER, "before": BEFORE}
"""The hidden states that the head reads: after the norm, as in most families, or before it."""


@dataclass
class _Draft:
    """What belongs to one sequence's draft in a cycle."""

    rows: int
    """Rows of the head's cache before the first drafted one."""
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """The head's hidden states after the nodes that were run, [2, hidden size] each."""
    drafted: list[int] = field(default_factory=list)
    """The nodes that have rows of their own, in the order of these: all that were run but the root."""

    def keep(self, nodes: Iterable[int], output: HeadOutput) -> None:
        """Keeps the hidden states of `nodes`."""
        self.hidden.update(zip(nodes, output.hidden, strict=True))


class HeadDrafter(PassDrafter):
    """Runs a model's head along draft trees, a level a pass.

    Where experts are missing, passes that do with those of the head that are resident, and passes that load what the
    head chooses, are compared by what the cycles gave.

    Which hidden states a head was trained on, its checkpoint does not say. Those of the model are tried on the first
    long enough prompt: the kind that predicts its tokens better is used. Those of the head itself are compared by what
    the cycles gave.
    """

    name = "mtp"
    takes_over = True

    def __init__(
        self, runner: ModelRunner, head: HeadRunner, experts: HeadExperts, chunk: int, max_depth: int = USUAL_DEPTH
    ) -> None:
        """`chunk` bounds the rows of a pass that reads hidden states, `max_depth` the depth of its drafts."""
        super().__init__(runner)
        self._experts = experts
        self._max_depth = max_depth
        self._head = head
        self._chunk = chunk
        self._kind: int | None = None
        self._chained = RuleChoice(tuple(KINDS))
        self._rule = "after"
        self._routings = RuleChoice(ROUTINGS)
        self._routing: str | None = None
        self._deep = False
        self._drafts: dict[Request, _Draft] = {}

    def takes(self, request: Request) -> bool:
        """See the base class: whether the head has had all of the sequence's hidden states."""
        cache = request.cache
        own = None if cache is None else cache.head
        return cache is not None and own is not None and own.rows + own.waiting == cache.tokens > 0

    def can_run(self, request: Request, tree: DraftTree, node: int) -> bool:
        """See the base class: after its parent, and not below the greatest depth."""
        if node and (request not in self._drafts or tree.parents[node] not in self._drafts[request].hidden):
            return False
        return tree.depths[node] < self._max_depth

    def observe(self, tokens: int, seconds: float) -> None:
        """See the base class."""
        if self._deep:
            self._chained.observe(self._rule, tokens, seconds)
        if self._routing is not None:
            self._routings.observe(self._routing, tokens, seconds)

    def begin(self, requests: Sequence[Request]) -> None:
        """See the base class. Nothing is read before the first run."""
        self._drafts, self._deep = {}, False
        self._rule = self._chained.next()
        self._routing = None if self._experts.complete else self._routings.next()

    def run(self, branches: Sequence[Branch]) -> list[LogitsRows]:
        """See the base class. The nodes of a branch are the root, or all `can_run`."""
        roots = [branch.request for branch in branches if branch.nodes[0] == 0]
        found = self._read(roots)
        others = [branch for branch in branches if branch.nodes[0]]
        outputs = self._draft([self._input(branch) for branch in others]) if others else []
        for branch, output in zip(others, outputs, strict=True):
            draft = self._drafts[branch.request]
            draft.keep(branch.nodes, output)
            draft.drafted += branch.nodes
            found[branch.request] = _read(output)
            self._deep = True
        return [found[branch.request] for branch in branches]

    def end(self) -> None:
        """See the base class."""
        drafts, self._drafts = self._drafts, {}
        with torch.inference_mode():
            for request, draft in drafts.items():
                self._head_cache(request).drop_rows(draft.rows)

    def _read(self, requests: Sequence[Request]) -> dict[Request, LogitsRows]:
        """Reads the hidden states that wait, down to that before each request's last token; the logits after it."""
        if not requests:
            return {}
        if self._kind is None:
            self._try_kinds(requests)
        for request in requests:
            cache = self._head_cache(request)
            while cache.waiting > self._chunk:
                # More than a pass takes, as after a long prompt: the first ones give nothing.
                self._draft([self._waiting_input(request, self._chunk)])
                cache.drop_first(self._chunk)
        inputs = [self._waiting_input(request, self._head_cache(request).waiting) for request in requests]
        outputs = self._draft(inputs)
        if self._routing == "resident":
            self._experts.load_missed()
        found = {}
        for request, item, output in zip(requests, inputs, outputs, strict=True):
            cache = self._head_cache(request)
            cache.drop_first(len(item.tokens))
            cache.mark_rows()
            draft = self._drafts[request] = _Draft(cache.rows)
            draft.keep([0], output)
            found[request] = _read(output)
        return found

    def _draft(self, inputs: Sequence[HeadInput]) -> list[HeadOutput]:
        """A pass of which drafts are made."""
        if self._routing != "resident":
            return self._head.run(inputs)
        rows, last = list[int](), 0
        for item in inputs:
            last += len(item.tokens)
            rows += range(last - item.outputs, last)
        with self._experts.resident_only(rows):
            return self._head.run(inputs)

    def _waiting_input(self, request: Request, rows: int) -> HeadInput:
        """The first `rows` hidden states that wait, with the tokens after them."""
        cache = self._head_cache(request)
        tokens = request.tokens[cache.rows + 1 : cache.rows + 1 + rows]
        return HeadInput(cache, tokens, cache.peek(rows, AFTER if self._kind is None else self._kind), 1)

    def _input(self, branch: Branch) -> HeadInput:
        """The rows of drafted nodes, which the head's own hidden states come before."""
        request, tree = branch.request, branch.tree
        kind, draft = KINDS[self._rule], self._drafts[request]
        order = [*draft.drafted, *branch.nodes]
        before = torch.stack([draft.hidden[tree.parents[node]][kind] for node in branch.nodes])
        tokens = [tree.tokens[node] for node in branch.nodes]
        mask = None
        if not (len(branch.nodes) == 1 and _is_path(tree, order)):
            depths = [tree.depths[node] - 1 for node in order]
            mask = TreeMask(draft.rows, depths, tree.ancestry()[list(branch.nodes)][:, order])
        return HeadInput(self._head_cache(request), tokens, before, len(tokens), mask)

    def _try_kinds(self, requests: Sequence[Request]) -> None:
        """Chooses the kind of the model's hidden states, if a request has enough of them."""
        request = max(requests, key=lambda each: self._head_cache(each).waiting)
        cache = self._head_cache(request)
        rows = min(cache.waiting - 1, self._chunk)
        if rows < MIN_TRIAL_ROWS or cache.rows:
            return
        found = {}
        for kind in KINDS.values():
            item = HeadInput(self._head.start(rows), request.tokens[1 : rows + 1], cache.peek(rows, kind), rows)
            (output,) = self._head.run([item])
            scores = on_host(output.logits).log_softmax(-1)
            found[kind] = float(scores[torch.arange(rows), request.tokens[2 : rows + 2]].mean())
        self._kind = max(found, key=lambda kind: found[kind])
        self._head.states.kind = self._kind

    def _head_cache(self, request: Request) -> HeadCache:
        cache = self._cache_of(request).head
        assert cache is not None
        return cache

    def _cache_of(self, request: Request) -> SequenceCache:
        assert request.cache is not None
        return request.cache


def _read(output: HeadOutput) -> LogitsRows:
    """The logits, of which a device's best ones are read now."""
    rows = output.logits
    if not isinstance(rows, torch.Tensor):
        rows.read_best()
    return rows


def _is_path(tree: DraftTree, nodes: Sequence[int]) -> bool:
    """Whether each of `nodes` is the child of the one before, the first one that of the root."""
    return [tree.parents[node] for node in nodes] == [0, *nodes[:-1]]
