"""One sequence's draft tree while it grows: what may come next, best first, within bounds."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from edgemoe.draft.controller import Setting
from edgemoe.model.draft_tree import Candidate, DraftTree
from edgemoe.request.request import Request


class TreeBuilder:
    """A tree, its bounds, and the candidates of a drafter that runs passes, best first by path probability."""

    def __init__(self, request: Request, max_nodes: int, setting: Setting) -> None:
        self.max_depth = setting.depth
        self.width = setting.width
        self.passes = setting.passes
        """Whether a drafter that runs passes may add to it."""
        self.request = request
        self.tree = DraftTree(request.tokens[-1])
        self.bins: dict[int, int] = {}
        """The nodes that were added with a bin."""
        self.loads: dict[int, int] = {}
        """The experts that nodes add to those that are resident or wanted by others, where a pass has told."""
        self.unexpanded = [0]
        """Nodes that no pass has run yet."""
        self._max_nodes = max_nodes
        self._heap: list[tuple[float, int, Candidate]] = []
        self._pushed = 0

    @property
    def chain(self) -> bool:
        """Whether no node may have two children."""
        return self.width == 1

    @property
    def full(self) -> bool:
        """Whether no node fits any more."""
        return self.tree.drafted >= self._max_nodes

    def fits(self, parent: int) -> bool:
        """Whether a child of `parent` is within the bounds."""
        if self.full or self.tree.depths[parent] >= self.max_depth:
            return False
        return not self.chain or parent == len(self.tree) - 1

    def add(self, candidate: Candidate) -> None:
        """Makes the candidate a node; one that is there already keeps the greater probability, and its bin if any."""
        before = len(self.tree)
        node = self.tree.add(candidate.parent, candidate.token, candidate.probability)
        if node == before:
            self.unexpanded.append(node)
        if candidate.bin is not None:
            self.bins.setdefault(node, candidate.bin)

    def propose(self, candidate: Candidate) -> None:
        """A candidate for `best_proposals`; what another drafter has made a node already is the surer for it."""
        if self.tree.child(candidate.parent, candidate.token) is not None:
            self.add(candidate)
            return
        heapq.heappush(self._heap, (-candidate.probability, self._pushed, candidate))
        self._pushed += 1

    def best_proposals(self) -> Iterator[Candidate]:
        """Takes out what was offered, best first; what does not fit any more is left out."""
        while self._heap:
            candidate = heapq.heappop(self._heap)[2]
            if self.fits(candidate.parent) and self.tree.child(candidate.parent, candidate.token) is None:
                yield candidate
