"""Drafts what followed the longest earlier match, in a sequence or in what others wrote: free of a model's passes.

Prompt lookup (Saxena 2023) in the incremental form of SAM-Decoding (arXiv 2411.10666); that of others is
SuffixDecoding's (arXiv 2411.04975). Every drafted token has a probability: the hit rate of matches of
its kind, which is measured in all that the model writes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from edgemoe.draft.reply_memory import ReplyMemory
from edgemoe.draft.suffix_automaton import Follower, Match, SuffixAutomaton
from edgemoe.model.draft_tree import Candidate, DraftTree
from edgemoe.prefetch.calibration import CalibratedRate

LENGTHS = (1, 2, 3, 4, 6, 9, 14, 24)
"""The longest match of each bucket of lengths but the last, which has no end."""
_BUCKET = tuple(sum(length > longest for longest in LENGTHS) for length in range(LENGTHS[-1] + 2))
_PRIOR = {
    (True, False, True): (0.30, 0.60, 0.70, 0.75, 0.80, 0.85, 0.85, 0.90, 0.90),
    (True, False, False): (0.20, 0.40, 0.50, 0.55, 0.65, 0.75, 0.80, 0.85, 0.90),
    (True, True, True): (0.15, 0.30, 0.35, 0.40, 0.40, 0.40, 0.40, 0.40, 0.40),
    (True, True, False): (0.08, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15),
    (False, False, True): (0.12, 0.20, 0.20, 0.20, 0.20, 0.20, 0.20, 0.20, 0.20),
    (False, False, False): (0.06, 0.10, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12),
    (False, True, True): (0.18, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30),
    (False, True, False): (0.06, 0.12, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15),
}
"""Hit rates before anything is measured, by bucket of lengths: those of source files and of changes to them.

A row is for followers that are told first or not, have a rival or not, and are repeated or not.
"""
PRIOR_WEIGHT = 4
"""Observations that a prior counts for ..."""
SHARED_WEIGHT = 16
"""... and what all sequences have shown, against a sequence's own."""
HALF_LIFE = 256
"""Observations of its kind after which one counts for half."""
_KEPT = 0.5 ** (1 / HALF_LIFE)
MAX_FOLLOWERS = 3
"""Tokens that may be drafted after any one; a fourth is next to never right."""


class Kind(NamedTuple):
    """What hit rates are kept by: they differ much between these and little within them."""

    bucket: int
    """Of the length that was matched."""
    rank: int
    """Followers told before it; the later ones count as one rank."""
    rival: bool
    """Whether another token followed the same; of those told later, whether it followed what the first did."""
    repeated: bool
    elsewhere: bool
    """Whether it was found in what others wrote."""

    @classmethod
    def of(cls, rank: int, follower: Follower, longest: int, elsewhere: bool = False) -> Kind:
        """The kind of the follower told after `rank` others, of which the first followed a suffix of `longest`."""
        rival = follower.length == longest if rank else not follower.sole
        bucket = _BUCKET[min(follower.length, LENGTHS[-1] + 1)]
        return cls(bucket, min(rank, 2), rival, follower.repeated, elsewhere)

    @property
    def prior(self) -> float:
        """The hit rate before anything is measured."""
        return _PRIOR[self.rank == 0, self.rival, self.repeated][self.bucket]


class NgramCalibration:
    """Hit rates of all sequences of an engine. One thread at a time may use it."""

    def __init__(self) -> None:
        self._rates: dict[Kind, CalibratedRate] = {}

    def rate(self, kind: Kind) -> float:
        """The share of this kind that hit, from 0 to 1."""
        measured = self._rates.get(kind)
        return kind.prior if measured is None else measured.blended(kind.prior, PRIOR_WEIGHT)

    def observe(self, kind: Kind, hit: bool) -> None:
        """Counts one follower that was, or was not, the model's token."""
        self._rates.setdefault(kind, CalibratedRate(_KEPT)).observe(hit)


class Standing(NamedTuple):
    """Where a sequence stands in its own text and in what all of them wrote."""

    own: Match
    common: Match


class NgramDrafter:
    """Drafts for one sequence; what it drafts is measured in every token the model writes, speculated or not.

    `ends` are the tokens that end a reply. In a prompt something follows them, in the reply nothing will. `memory` is
    of what others wrote, and gets what the model writes here; None drafts from the sequence alone.
    """

    def __init__(
        self, calibration: NgramCalibration, ends: Collection[int] = (), memory: ReplyMemory | None = None
    ) -> None:
        self.ends = frozenset(ends)
        self._calibration = calibration
        self._own: dict[Kind, CalibratedRate] = {}
        self._automaton = SuffixAutomaton()
        self._memory = ReplyMemory() if memory is None else memory
        self._reply = self._memory.begin(())
        self._untold: list[int] = []

    def __len__(self) -> int:
        """Tokens of prompt and reply so far."""
        return len(self._automaton)

    def read(self, prompt: Sequence[int]) -> None:
        """Appends tokens that the model did not write: how they repeat themselves is no measure of how it does."""
        for token in prompt:
            self._automaton.append(token)
        self._reply = self._memory.begin(prompt)

    def extend(self, reply: Sequence[int]) -> None:
        """Appends tokens that the model wrote, and measures what would have been drafted for each."""
        self.learn(reply)
        self.tell()

    def learn(self, reply: Sequence[int]) -> None:
        """As `extend`, but the others are not told yet: `tell` has to follow before anything is drafted.

        So that what several sequences wrote in one step is not measured as if one could have drafted it of the other.
        """
        common = self._memory.match(self._reply)
        for token in reply:
            for drafted, kind in self._followers(Standing(self._automaton.match, common)):
                hit = drafted == token
                self._calibration.observe(kind, hit)
                self._own.setdefault(kind, CalibratedRate(_KEPT)).observe(hit)
                if hit:
                    break
            self._automaton.append(token)
            common = self._memory.advance(common, token)
        self._untold += reply

    def tell(self) -> None:
        """Lets the others draft from what was learnt."""
        for token in self._untold:
            self._memory.append(self._reply, token)
        self._untold.clear()

    def frontier(
        self, tree: DraftTree, *, branching: bool = True, max_depth: int, min_probability: float
    ) -> NgramFrontier:
        """What `tree`, whose root is the last token of the sequence, may grow by; it holds until the sequence grows."""
        return NgramFrontier(self, tree, branching, max_depth, min_probability)

    def grow(
        self, tree: DraftTree, max_nodes: int, max_depth: int, min_probability: float, *, branching: bool = True
    ) -> None:
        """Adds the likeliest nodes to `tree`, `max_nodes` at most, each of `min_probability` at least."""
        frontier = self.frontier(tree, branching=branching, max_depth=max_depth, min_probability=min_probability)
        for _ in range(max_nodes):
            best = frontier.best()
            if best is None:
                break
            tree.add(best.parent, best.token, best.probability)

    @property
    def match(self) -> Standing:
        """Where the sequence stands."""
        return Standing(self._automaton.match, self._memory.match(self._reply))

    def advance(self, match: Standing, token: int) -> Standing:
        """Where it would stand with `token` drafted after `match`."""
        return Standing(self._automaton.advance(match.own, token), self._memory.advance(match.common, token))

    def predictions(self, match: Standing) -> Iterator[tuple[int, float]]:
        """Tokens that may come next, and the probability of each.

        A hit rate is that of a follower whose predecessors in the list were wrong, so the probabilities of all are
        at most 1 together.
        """
        left = 1.0
        for token, kind in self._followers(match):
            rate = self._rate(kind)
            yield token, left * rate
            left *= 1 - rate

    def _followers(self, match: Standing) -> Iterator[tuple[int, Kind]]:
        """Each token once, after the longest suffix that it followed; its own text comes before that of others."""
        own = ((follower, False) for follower in self._automaton.followers(match.own))
        common = ((follower, True) for follower in self._memory.followers(match.common))
        told: dict[int, Kind] = {}
        longest = 0
        for follower, elsewhere in heapq.merge(own, common, key=lambda each: -each[0].length):
            if follower.token in told:
                continue
            longest = longest or follower.length
            told[follower.token] = kind = Kind.of(len(told), follower, longest, elsewhere)
            yield follower.token, kind
            if len(told) == MAX_FOLLOWERS:
                break

    def _rate(self, kind: Kind) -> float:
        shared, own = self._calibration.rate(kind), self._own.get(kind)
        return shared if own is None else own.blended(shared, SHARED_WEIGHT)


class NgramFrontier:
    """The nodes that a tree may grow by, the likeliest first.

    Whoever takes a candidate adds it to the tree. Nodes that others add are continued too, at the probability they
    came with. Without `branching` only nodes without children are continued.
    """

    def __init__(
        self, drafter: NgramDrafter, tree: DraftTree, branching: bool, max_depth: int, min_probability: float
    ) -> None:
        self._drafter = drafter
        self._tree = tree
        self._branching = branching
        self._max_depth = max_depth
        self._least = min_probability
        self._matches: list[Standing] = []
        self._waiting: list[tuple[float, int, int]] = []

    def best(self) -> Candidate | None:
        """The likeliest candidate that is not in the tree, if there is one."""
        for node in range(len(self._matches), len(self._tree)):
            self._meet(node)
        while self._waiting:
            negative, parent, token = self._waiting[0]
            if self._is_open(parent, token):
                return Candidate(parent, token, -negative)
            heapq.heappop(self._waiting)
        return None

    def _meet(self, node: int) -> None:
        tree, drafter = self._tree, self._drafter
        parent = tree.parents[node]
        match = drafter.match if parent < 0 else drafter.advance(self._matches[parent], tree.tokens[node])
        self._matches.append(match)
        if tree.depths[node] >= self._max_depth or tree.tokens[node] in drafter.ends:
            return
        left = tree.probabilities[node]
        for token, probability in drafter.predictions(match):
            path = tree.probabilities[node] * probability
            if path >= self._least:
                heapq.heappush(self._waiting, (-path, node, token))
            left -= path
            if left < self._least:
                break

    def _is_open(self, parent: int, token: int) -> bool:
        tree = self._tree
        return tree.child(parent, token) is None and (self._branching or not tree.children(parent))
