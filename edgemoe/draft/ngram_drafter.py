"""Drafts the tokens that followed the longest earlier match, in the sequence or in other replies, without a pass.

Prompt lookup (Saxena 2023) in the incremental form of SAM-Decoding (arXiv 2411.10666); drafting from other replies is
SuffixDecoding's (arXiv 2411.04975). The probability of a drafted token is the acceptance rate of matches of its kind,
measured on every token that the model writes.
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
"""The greatest match length of each bucket; one more bucket is for longer matches."""
_BUCKET = tuple(sum(length > longest for longest in LENGTHS) for length in range(LENGTHS[-1] + 2))
_PRIORS = {
    (True, False, True): (0.30, 0.60, 0.70, 0.75, 0.80, 0.85, 0.85, 0.90, 0.90),
    (True, False, False): (0.20, 0.40, 0.50, 0.55, 0.65, 0.75, 0.80, 0.85, 0.90),
    (True, True, True): (0.15, 0.30, 0.35, 0.40, 0.40, 0.40, 0.40, 0.40, 0.40),
    (True, True, False): (0.08, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15),
    (False, False, True): (0.12, 0.20, 0.20, 0.20, 0.20, 0.20, 0.20, 0.20, 0.20),
    (False, False, False): (0.06, 0.10, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12),
    (False, True, True): (0.18, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30),
    (False, True, False): (0.06, 0.12, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.15),
}
"""Acceptance rates before any is measured, by length bucket, from source files and edits of them.

The key is whether the follower has rank 0, has a rival, and is repeated: see `Kind`.
"""
PRIOR_WEIGHT = 4
"""Observations that a prior counts for."""
SHARED_WEIGHT = 16
"""Observations that the rate of all sequences counts for in the rate of one sequence."""
HALF_LIFE = 256
"""Observations of the same kind after which an observation has half of its weight."""
_DECAY = 0.5 ** (1 / HALF_LIFE)
MAX_FOLLOWERS = 3
"""Tokens that may be drafted after one node; a fourth is almost never right."""


class Kind(NamedTuple):
    """The kind of a follower. Acceptance rates differ much between kinds and little within one."""

    bucket: int
    """The bucket of the match length: see `LENGTHS`."""
    rank: int
    """How many followers rank before it, at most 2."""
    rival: bool
    """For rank 0, whether its suffix has other followers; for the others, whether it shares the suffix of rank 0."""
    repeated: bool
    """Whether it followed its suffix more than once."""
    from_replies: bool
    """Whether it was found in the reply memory, and not in the sequence itself."""

    @classmethod
    def of(cls, rank: int, follower: Follower, longest: int, from_replies: bool = False) -> Kind:
        """The kind of `follower`, which ranks after `rank` others; `longest` is the match length of rank 0."""
        rival = follower.length == longest if rank else not follower.sole
        bucket = _BUCKET[min(follower.length, LENGTHS[-1] + 1)]
        return cls(bucket, min(rank, 2), rival, follower.repeated, from_replies)

    @property
    def prior(self) -> float:
        """The acceptance rate before any is measured, from 0 to 1."""
        return _PRIORS[self.rank == 0, self.rival, self.repeated][self.bucket]


class NgramCalibration:
    """The acceptance rates of all sequences of an engine, by kind. One thread at a time may use it."""

    def __init__(self) -> None:
        self._rates: dict[Kind, CalibratedRate] = {}

    def rate(self, kind: Kind) -> float:
        """The acceptance rate of `kind`, from 0 to 1."""
        measured = self._rates.get(kind)
        return kind.prior if measured is None else measured.blended(kind.prior, PRIOR_WEIGHT)

    def observe(self, kind: Kind, accepted: bool) -> None:
        """Counts one follower, `accepted` if the model wrote it."""
        self._rates.setdefault(kind, CalibratedRate(_DECAY)).observe(accepted)


class Matches(NamedTuple):
    """The longest matches of a sequence's end. Valid until the sequence, or for `replies` any reply, grows."""

    own: Match
    """In the sequence itself."""
    replies: Match
    """In the reply memory."""


class NgramDrafter:
    """Drafts for one sequence. Every token that the model writes is compared with what would have been drafted."""

    def __init__(
        self, calibration: NgramCalibration, ends: Collection[int] = (), memory: ReplyMemory | None = None
    ) -> None:
        """`calibration` is shared by all sequences of an engine, and is updated.

        `ends` are the tokens that end a reply: no token is drafted after them. `memory` has the replies of other
        sequences, and gets this one's; None drafts from this sequence alone.
        """
        self.ends = frozenset(ends)
        self._calibration = calibration
        self._own: dict[Kind, CalibratedRate] = {}
        self._automaton = SuffixAutomaton()
        self._memory = ReplyMemory() if memory is None else memory
        self._reply = self._memory.begin(())
        self._unpublished: list[int] = []

    def __len__(self) -> int:
        """Tokens of prompt and reply so far."""
        return len(self._automaton)

    def read(self, prompt: Sequence[int]) -> None:
        """Appends tokens that the model did not write: they are matched, but not used as measurements."""
        for token in prompt:
            self._automaton.append(token)
        self._reply = self._memory.begin(prompt)

    def extend(self, reply: Sequence[int]) -> None:
        """`learn`, then `publish`."""
        self.learn(reply)
        self.publish()

    def learn(self, reply: Sequence[int]) -> None:
        """Appends tokens that the model wrote, and measures what would have been drafted for each.

        The reply memory does not have them until `publish`, which must follow before the next draft. With several
        sequences all `learn` before any `publish`: tokens of the same step cannot have been drafted from one another.
        """
        replies = self._memory.match(self._reply)
        for token in reply:
            for drafted, kind in self._followers(Matches(self._automaton.match, replies)):
                accepted = drafted == token
                self._calibration.observe(kind, accepted)
                self._own.setdefault(kind, CalibratedRate(_DECAY)).observe(accepted)
                if accepted:
                    break
            self._automaton.append(token)
            replies = self._memory.advance(replies, token)
        self._unpublished += reply

    def publish(self) -> None:
        """Adds the learnt tokens to the reply memory, for all sequences to draft from."""
        for token in self._unpublished:
            self._memory.append(self._reply, token)
        self._unpublished.clear()

    def frontier(
        self, tree: DraftTree, *, branching: bool = True, max_depth: int, min_probability: float
    ) -> NgramFrontier:
        """The candidates for `tree`, whose root is the sequence's last token. Valid until a reply grows.

        `max_depth` counts drafted tokens on a path; `min_probability` is a path probability. See `NgramFrontier`.
        """
        return NgramFrontier(self, tree, branching, max_depth, min_probability)

    def grow(
        self, tree: DraftTree, max_nodes: int, max_depth: int, min_probability: float, *, branching: bool = True
    ) -> None:
        """Adds up to `max_nodes` candidates to `tree`, most probable first. Other arguments as in `frontier`."""
        frontier = self.frontier(tree, branching=branching, max_depth=max_depth, min_probability=min_probability)
        for _ in range(max_nodes):
            best = frontier.best()
            if best is None:
                break
            tree.add(best.parent, best.token, best.probability)

    @property
    def match(self) -> Matches:
        """The matches of the sequence's end."""
        return Matches(self._automaton.match, self._memory.match(self._reply))

    def advance(self, match: Matches, token: int) -> Matches:
        """The matches with `token` drafted after `match`."""
        return Matches(self._automaton.advance(match.own, token), self._memory.advance(match.replies, token))

    def predictions(self, match: Matches) -> Iterator[tuple[int, float]]:
        """The tokens that may follow `match`, at most `MAX_FOLLOWERS`, each with its probability.

        The acceptance rate of a follower is conditional on all that rank before it being wrong, so the probabilities
        sum to at most 1.
        """
        left = 1.0
        for token, kind in self._followers(match):
            rate = self._rate(kind)
            yield token, left * rate
            left *= 1 - rate

    def _followers(self, match: Matches) -> Iterator[tuple[int, Kind]]:
        """The followers by descending match length, each token once; the sequence itself wins ties."""
        own = ((follower, False) for follower in self._automaton.followers(match.own))
        replies = ((follower, True) for follower in self._memory.followers(match.replies))
        seen: set[int] = set()
        longest = 0
        for follower, from_replies in heapq.merge(own, replies, key=lambda each: -each[0].length):
            if follower.token in seen:
                continue
            longest = longest or follower.length
            kind = Kind.of(len(seen), follower, longest, from_replies)
            seen.add(follower.token)
            yield follower.token, kind
            if len(seen) == MAX_FOLLOWERS:
                break

    def _rate(self, kind: Kind) -> float:
        shared, own = self._calibration.rate(kind), self._own.get(kind)
        return shared if own is None else own.blended(shared, SHARED_WEIGHT)


class NgramFrontier:
    """The candidate nodes of a draft tree, most probable first.

    The caller adds the candidates that it takes to the tree. Nodes that others add get candidates too, from the path
    probability that they were added with. Without `branching` only nodes without children get candidates.
    """

    def __init__(
        self, drafter: NgramDrafter, tree: DraftTree, branching: bool, max_depth: int, min_probability: float
    ) -> None:
        self._drafter = drafter
        self._tree = tree
        self._branching = branching
        self._max_depth = max_depth
        self._min_probability = min_probability
        self._matches: list[Matches] = []
        self._heap: list[tuple[float, int, int]] = []

    def best(self) -> Candidate | None:
        """The most probable candidate that is not in the tree; None when there is none."""
        for node in range(len(self._matches), len(self._tree)):
            self._expand(node)
        while self._heap:
            negative, parent, token = self._heap[0]
            if self._is_candidate(parent, token):
                return Candidate(parent, token, -negative)
            heapq.heappop(self._heap)
        return None

    def _expand(self, node: int) -> None:
        """Adds the candidates after `node`, whose parent is expanded."""
        tree, drafter = self._tree, self._drafter
        parent = tree.parents[node]
        match = drafter.match if parent < 0 else drafter.advance(self._matches[parent], tree.tokens[node])
        self._matches.append(match)
        if tree.depths[node] >= self._max_depth or tree.tokens[node] in drafter.ends:
            return
        left = tree.probabilities[node]
        for token, probability in drafter.predictions(match):
            path = tree.probabilities[node] * probability
            if path >= self._min_probability:
                heapq.heappush(self._heap, (-path, node, token))
            left -= path
            if left < self._min_probability:
                break

    def _is_candidate(self, parent: int, token: int) -> bool:
        tree = self._tree
        return tree.child(parent, token) is None and (self._branching or not tree.children(parent))
