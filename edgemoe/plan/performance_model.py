"""How long passes take on one machine, and what speculation is worth there: MoESD's model with its parameters.

The model of MoESD (arXiv 2505.19645, section 3.3), extended by what it leaves out: a link that brings the experts that
are not resident, routing that neighbouring tokens share, and a CPU's change from kernels to full matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgemoe.plan import moesd

MIN_COST = 0.01
"""The least that one more token costs, as a share of what each token of a plain step takes on the average."""


@dataclass(frozen=True)
class ModelShape:
    """What of a checkpoint decides how long its passes take."""

    layers: int
    """MoE layers."""
    experts: int
    """Experts of a layer."""
    top_k: int
    record_nbytes: int
    """Bytes of one expert."""
    dense_nbytes: int
    """Bytes of all other weights."""
    itemsize: int
    """Bytes of one weight."""


@dataclass(frozen=True)
class MachineSpeed:
    """The two ceilings of a roofline, and the link. All measured."""

    memory: float
    """Bytes a second at which the slots can be read."""
    arithmetic: float
    """Floating-point operations a second of a large matrix product in the model's dtype."""
    link: float
    """Bytes a second at which records come over the link while it works."""

    def ridge(self, itemsize: int) -> float:
        """The ridge point in tokens: with more, a product of weights of `itemsize` bytes is bound by arithmetic."""
        # A weight is read once, and multiplied and added once for each token.
        return self.arithmetic / self.memory * itemsize / 2


@dataclass(frozen=True)
class Routing:
    """How many experts tokens activate that resemble one another: N(t) with an effective E and effective tokens.

    `tokens` tokens of each of `batch` sequences activate as many as batch^among * tokens^within tokens would that
    choose evenly among `experts`.
    """

    experts: float
    among: float
    within: float

    def activated(self, top_k: int, batch: float, tokens: float) -> float:
        """Experts of a layer, on the average."""
        return moesd.expected_experts(self.experts, top_k, batch**self.among * tokens**self.within)


@dataclass(frozen=True)
class Locality:
    """How much more often experts are hit than their share of the slots says: misses are (1 - share)^power.

    The power is `few` for passes that want next to no experts and `all` for those that want every one, between them
    in proportion.
    """

    few: float
    all: float

    def hit_rate(self, share: float, wanted: float) -> float:
        """For slots for a `share` of the experts and passes that want another share of them; both from 0 to 1."""
        return float(1 - (1 - share) ** (self.few * (1 - wanted) + self.all * wanted))


@dataclass(frozen=True)
class Times:
    """What was fitted, in seconds where nothing else is said. The first ten are MoESD's parameters."""

    bias: float
    token: float
    """k1, of G(t)."""
    expert: float
    """k2, of N(t)."""
    load: float
    """k3, of G(T_exp)."""
    knee: float
    """lambda: the knee of G as a share of the ridge point."""
    base: float
    """s, the base of G."""
    draft_bias: float
    draft_sequence: float
    reject_bias: float
    reject_sequence: float
    exposed: float
    """Share of the link's time that lengthens a pass: the rest is hidden behind computing."""
    bulk_from: int
    """Tokens of a pass from which PyTorch's products take over from kernels; 0 where nothing does."""
    bulk_bias: float
    bulk_token: float
    """Of each token of such a pass ..."""
    bulk_exposed: float
    """... in which another share of the link's time is hidden."""


@dataclass(frozen=True)
class Worth:
    """What it is worth to draft so many tokens for each verification."""

    drafted: int
    target_efficiency: float
    speedup: float
    """Tokens a second over those without drafts."""


@dataclass(frozen=True)
class Outlook:
    """What is to be expected of so many sequences."""

    batch: int
    tokens_per_second: float
    """Of all of them together, without drafts."""
    experts: float
    """Experts of a layer that a plain step asks for."""
    hit_rate: float
    """Of a plain step."""
    drafts: tuple[Worth, ...]


@dataclass(frozen=True)
class PerformanceModel:
    """Answers for one checkpoint on one machine. A hit rate is from 0 to 1, where 1 is everything resident."""

    shape: ModelShape
    speed: MachineSpeed
    routing: Routing
    locality: Locality
    times: Times

    # --- experts -----------------------------------------------------------------------------------

    def activated(self, batch: float, tokens: float = 1) -> float:
        """N: experts of a layer that a pass asks for."""
        return self.routing.activated(self.shape.top_k, batch, tokens)

    def hit_rate(self, cache_share: float, batch: float, tokens: float = 1) -> float:
        """The hit rate to expect with slots for this share of the experts."""
        if cache_share >= 1:
            return 1.0
        return self.locality.hit_rate(cache_share, self.activated(batch, tokens) / self.shape.experts)

    # --- seconds -----------------------------------------------------------------------------------

    def step_seconds(self, batch: float, tokens: float = 1, hit_rate: float = 1.0) -> float:
        """T_T: a pass over `tokens` tokens of each of `batch` sequences; one token each is a plain step."""
        misses = self.shape.layers * self.activated(batch, tokens) * (1 - hit_rate)
        return self.pass_seconds(batch * tokens, self.activated(batch, tokens), misses)

    def pass_seconds(self, total: float, activated: float, misses: float) -> float:
        """The same, given the tokens of all sequences, the experts of a layer and the misses of all layers."""
        times = self.times
        link = misses * self.shape.record_nbytes / self.speed.link
        if times.bulk_from and total >= times.bulk_from:
            computing = times.bulk_bias + times.expert * activated + times.bulk_token * total
            return max(link, computing + times.bulk_exposed * link)
        computing = times.bias + times.expert * activated
        computing += times.token * self._growth(total)
        computing += times.load * self._growth(self.shape.top_k * total / activated)
        return max(link, computing + times.exposed * link)

    def cycle_seconds(self, batch: float, gamma: int, hit_rate: float = 1.0) -> float:
        """Drafting, verifying and taking back `gamma` drafted tokens of each sequence."""
        draft, reject = self._around(batch)
        return draft + self.step_seconds(batch, gamma + 1, hit_rate) + reject

    # --- what it is worth --------------------------------------------------------------------------

    def target_efficiency(
        self, batch: float, gamma: int, hit_rate: float = 1.0, verify_hit_rate: float | None = None
    ) -> float:
        """T_T(B, 1) / T_T(B, gamma); the hit rates are those of `speedup`."""
        return moesd.target_efficiency(*self._plain_and_verify(batch, gamma, hit_rate, verify_hit_rate))

    def speedup(
        self, batch: float, gamma: int, tokens: float, hit_rate: float = 1.0, verify_hit_rate: float | None = None
    ) -> float:
        """Tokens a second with drafts over those without, where a cycle gives `tokens` (see moesd.tokens_per_cycle).

        `verify_hit_rate` is the verifications' own, where it differs from a plain step's.
        """
        draft, reject = self._around(batch)
        plain, verify = self._plain_and_verify(batch, gamma, hit_rate, verify_hit_rate)
        return moesd.speedup(tokens, plain, draft, verify, reject)

    def outlook(self, batch: int, cache_share: float, alpha: float, depths: Iterable[int]) -> Outlook:
        """All of this for slots for a share of the experts, where a drafted token is right with probability `alpha`."""
        plain, worth = self.hit_rate(cache_share, batch), []
        for depth in depths:
            rates = plain, self.hit_rate(cache_share, batch, depth + 1)
            gain = self.speedup(batch, depth, moesd.tokens_per_cycle(alpha, depth), *rates)
            worth.append(Worth(depth, self.target_efficiency(batch, depth, *rates), gain))
        return Outlook(batch, self.tokens_per_second(batch, plain), self.activated(batch), plain, tuple(worth))

    def tokens_per_second(self, batch: float, hit_rate: float = 1.0, gamma: int = 0, tokens: float = 1.0) -> float:
        """Of all sequences together: plain, or in cycles that draft `gamma` tokens and give `tokens`."""
        seconds = self.cycle_seconds(batch, gamma, hit_rate) if gamma else self.step_seconds(batch, 1, hit_rate)
        return batch * tokens / seconds

    def token_cost(self, batch: int, hit_rate: float = 1.0) -> float:
        """What one more token in a step of `batch` sequences costs, as a share of that step; always more than 0."""
        plain = self.step_seconds(batch, 1, hit_rate)
        more = (self.step_seconds(batch, 1 + 1 / batch, hit_rate) - plain) / plain
        # Where that token brings the change to faster products, the longer pass may be the shorter one. A price of
        # nothing or less is no price: by such a guess nothing would ever be drafted.
        return max(more, MIN_COST / batch)

    def _plain_and_verify(
        self, batch: float, gamma: int, hit_rate: float, verify_hit_rate: float | None
    ) -> tuple[float, float]:
        """Seconds of a plain step and of a verification."""
        verify = hit_rate if verify_hit_rate is None else verify_hit_rate
        return self.step_seconds(batch, 1, hit_rate), self.step_seconds(batch, gamma + 1, verify)

    def _around(self, batch: float) -> tuple[float, float]:
        """Seconds of drafting before a verification, and of what follows it.

        MoESD's gamma * T_D is one look-up here: an n-gram drafter finds all that it drafts for a sequence at once, and
        one sequence after the other, so that its time goes with the batch and not with G.
        """
        times = self.times
        draft = times.draft_bias + times.draft_sequence * batch
        return draft, times.reject_bias + times.reject_sequence * batch

    def _growth(self, tokens: float) -> float:
        return moesd.growth(tokens, self.times.knee * self.speed.ridge(self.shape.itemsize), self.times.base)
