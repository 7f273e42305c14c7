"""Tokens that may follow a sequence, as a tree that one pass verifies, and the mask of that pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class Candidate(NamedTuple):
    """A node that a tree may get."""

    parent: int
    token: int
    probability: float
    """That everything from the root down to it is accepted."""
    bin: int | None = None
    """Which kind of foretelling it is, for who learns how often these are right."""
    drafter: str = "ngram"
    """What proposes it."""


class DraftTree:
    """Drafted tokens, each after its parent. Node 0 is the root: the sequence's last token, which is certain.

    Nodes are numbered in the order of their adding, so that a parent comes before its children, and a chain is
    a tree whose every parent is the node before. `tokens`, `parents` and `depths` (0 for the root) have one
    entry a node; `probabilities` are path probabilities, the drafter's estimate that everything from the root
    down to the node is accepted.
    """

    def __init__(self, root: int) -> None:
        self.tokens = [root]
        self.parents = [-1]
        self.depths = [0]
        self.probabilities = [1.0]
        self._children: list[dict[int, int]] = [{}]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def drafted(self) -> int:
        """Nodes beside the root."""
        return len(self.tokens) - 1

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def truncate(self, drafted: int) -> None:
        """Keeps the root and the first `drafted` nodes. A parent comes before its children, so a tree is left."""
        for node in range(len(self.tokens) - 1, drafted, -1):
            del self._children[self.parents[node]][self.tokens[node]]
        for values in (self.tokens, self.parents, self.depths, self.probabilities, self._children):
            del values[drafted + 1 :]

    def add(self, parent: int, token: int, probability: float) -> int:
        """The child of `parent` with `token`, made where there is none; it keeps the greater path probability.

        With it the probabilities of what follows it rise.
        """
        known = self._children[parent].get(token)
        if known is not None:
            self._raise(known, probability)
            return known
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.probabilities.append(probability)
        self._children.append({})
        self._children[parent][token] = node
        return node

    def _raise(self, node: int, probability: float) -> None:
        if probability <= self.probabilities[node]:
            return
        ratio = probability / self.probabilities[node]
        below = {node}
        for each in range(node, len(self)):
            if each == node or self.parents[each] in below:
                below.add(each)
                self.probabilities[each] *= ratio

    def child(self, parent: int, token: int) -> int | None:
        """The node that continues `parent` with `token`, if it was drafted."""
        return self._children[parent].get(token)

    def children(self, parent: int) -> Sequence[int]:
        """The nodes after `parent`, in the order of their adding."""
        return list(self._children[parent].values())

    def path(self, node: int) -> list[int]:
        """The nodes from the root down to `node`, both included."""
        upwards = list(self._upwards(node))
        return upwards[::-1]

    def text(self, node: int) -> list[int]:
        """The drafted tokens down to `node`, without the root's."""
        return [self.tokens[each] for each in self.path(node)[1:]]

    def ancestry(self) -> torch.Tensor:
        """Bool [nodes, nodes]: whether the column's node is on the way from the root to the row's, itself included."""
        ancestors = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            ancestors[node] |= ancestors[parent]
        return ancestors

    def _upwards(self, node: int) -> Iterator[int]:
        while node >= 0:
            yield node
            node = self.parents[node]


class TreeMask(NamedTuple):
    """Tree attention (SpecInfer, arXiv 2305.09781): which cached and new tokens each token of a pass attends to.

    The first `base` tokens of the cache are committed, and every token attends to them. Drafted tokens follow: those
    of earlier passes, then those of this pass. `depths` are their distances from `base`. `ancestors`, bool [tokens of
    the pass, drafted tokens], marks the drafted tokens that a token attends to, itself included.
    """

    base: int
    depths: Sequence[int]
    ancestors: torch.Tensor

    @property
    def positions(self) -> list[int]:
        """The positions of the pass's tokens."""
        return [self.base + depth for depth in self.depths[len(self.depths) - len(self.ancestors) :]]

    def visible(self, keys: int, window: int | None) -> torch.Tensor:
        """Bool [tokens, keys]: which of the last `keys` keys each token attends to, in a layer with `window`."""
        drafted = len(self.depths)
        held = keys - drafted
        before = torch.ones(len(self.ancestors), held, dtype=torch.bool)
        visible = torch.cat([before, self.ancestors], dim=1)
        if window is None:
            return visible
        rows = torch.tensor([*range(self.base - held, self.base), *(self.base + depth for depth in self.depths)])
        return visible & (rows > torch.tensor(self.positions)[:, None] - window)


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`visible`, bool [tokens, keys], as a mask added to scores: 0 where visible, else the least number of `dtype`."""
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, hidden)
