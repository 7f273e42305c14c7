"""Builds one sequence's draft tree: candidates in the order of their probability, within bounds."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from itertools import takewhile

from edgemoe.draft.controller import Setting
from edgemoe.model.draft_tree import Candidate, DraftTree
from edgemoe.request.request import Request


class TreeBuilder:
    """A draft tree, its bounds, and proposed candidates, ordered by path probability."""

    def __init__(self, request: Request, max_nodes: int, setting: Setting) -> None:
        self.max_depth = setting.depth
        self.width = setting.width
        self.passes = setting.passes
        """Whether drafting passes may be run for it."""
        self.request = request
        self.tree = DraftTree(request.tokens[-1])
        self.bins: dict[int, int] = {}
        """Calibration bins of nodes, where they have one."""
        self.drafters: dict[int, str] = {}
        """The drafter that proposed each node first."""
        self.loads: dict[int, int] = {}
        """Number of experts that a node adds to those resident or needed already; for nodes that a pass has run."""
        self.unexpanded = [0]
        """Nodes that no drafting pass has run yet."""
        self._max_nodes = max_nodes
        self._heap: list[tuple[float, int, Candidate]] = []
        self._pushed = 0

    @property
    def chain(self) -> bool:
        """Whether no node may have two children."""
        return self.width == 1

    @property
    def full(self) -> bool:
        """Whether the tree has all the nodes that it may have."""
        return self.tree.drafted >= self._max_nodes

    def fits(self, parent: int) -> bool:
        """Whether a child of `parent` is within the bounds."""
        if self.full or self.tree.depths[parent] >= self.max_depth:
            return False
        return not self.chain or parent == len(self.tree) - 1

    def openings(self, nodes: Collection[int]) -> Iterator[tuple[int, float, int]]:
        """The nodes that drafting passes have not run yet and that may get another child, if the next one runs `nodes`.

        With each come the sum of its children's path probabilities, and the number of passes until it has been run:
        every node is run after its parent.
        """
        waiting = set(self.unexpanded)
        for node in self.unexpanded:
            upwards = list(takewhile(waiting.__contains__, reversed(self.tree.path(node))))
            if self.fits(node) and upwards and upwards[-1] in nodes:
                covered = sum(self.tree.probabilities[child] for child in self.tree.children(node))
                yield node, covered, 1 + sum(each not in nodes for each in upwards)

    def add(self, candidate: Candidate) -> None:
        """Adds the candidate. A node that exists keeps the greater probability, and its bin where it has one."""
        before = len(self.tree)
        node = self.tree.add(candidate.parent, candidate.token, candidate.probability)
        if node == before:
            self.unexpanded.append(node)
            self.drafters[node] = candidate.drafter
        if candidate.bin is not None:
            self.bins.setdefault(node, candidate.bin)

    def propose(self, candidate: Candidate) -> None:
        """Queues a candidate for `best_proposals`; one that is a node already raises that node's probability."""
        if self.tree.child(candidate.parent, candidate.token) is not None:
            self.add(candidate)
            return
        heapq.heappush(self._heap, (-candidate.probability, self._pushed, candidate))
        self._pushed += 1

    def best_proposals(self) -> Iterator[Candidate]:
        """Removes and yields the queued candidates, best first, except those that no longer fit."""
        while self._heap:
            candidate = heapq.heappop(self._heap)[2]
            if self.fits(candidate.parent) and self.tree.child(candidate.parent, candidate.token) is None:
                yield candidate
