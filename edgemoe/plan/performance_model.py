"""The performance model: seconds of a pass on one machine, and the speed-up of speculation there.

The model of MoESD (arXiv 2505.19645, section 3.3) with three additions: a link that brings missing experts, routing
that neighbouring tokens share, and a CPU's switch from kernels to full matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgemoe.plan import moesd

MIN_COST = 0.01
"""Lower bound of the cost of one more token, as a share of the mean time per token of a plain step."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a checkpoint that determine the time of its passes."""

    layers: int
    """MoE layers."""
    experts: int
    """Experts per layer."""
    top_k: int
    record_nbytes: int
    """Bytes of one expert."""
    dense_nbytes: int
    """Bytes of all other weights."""
    itemsize: int
    """Bytes of one weight."""


@dataclass(frozen=True)
class MachineSpeed:
    """The two ceilings of the roofline, and the link, as measured."""

    memory: float
    """Bytes per second of reading the slots."""
    arithmetic: float
    """Floating-point operations per second of a large matrix product in the model's dtype."""
    link: float
    """Bytes per second of the link while it is busy."""

    def ridge(self, itemsize: int) -> float:
        """The ridge point in tokens: above it, arithmetic bounds a product of weights of `itemsize` bytes."""
        # Each weight is read once, and takes one multiplication and one addition per token.
        return self.arithmetic / self.memory * itemsize / 2


@dataclass(frozen=True)
class Routing:
    """N(t) for tokens with similar routing, with an effective number of experts and of tokens.

    `tokens` tokens of each of `batch` sequences activate as many experts as batch^among * tokens^within tokens with
    uniform routing over `experts`.
    """

    experts: float
    """Effective experts per layer."""
    among: float
    """Exponent of the number of sequences, from 0 to 1."""
    within: float
    """Exponent of the tokens per sequence, from 0 to 1."""

    def activated(self, top_k: int, batch: float, tokens: float) -> float:
        """Mean number of activated experts per layer."""
        return moesd.expected_experts(self.experts, top_k, batch**self.among * tokens**self.within)


@dataclass(frozen=True)
class Locality:
    """The hit rate of a cache with slots for a share of the experts: its miss rate is (1 - share)^power.

    A power of 1 means no locality. The power is linear in the share of experts that a pass requests: `few` near none
    of them, `all` at every one.
    """

    few: float
    all: float

    def hit_rate(self, share: float, wanted: float) -> float:
        """The hit rate with slots for a `share` of the experts, for passes that request a share `wanted` of them."""
        return float(1 - (1 - share) ** (self.few * (1 - wanted) + self.all * wanted))


@dataclass(frozen=True)
class Times:
    """The fitted parameters, in seconds unless stated otherwise. The first ten are MoESD's."""

    bias: float
    token: float
    """k1, of G(t)."""
    expert: float
    """k2, of N(t)."""
    load: float
    """k3, of G(T_exp)."""
    knee: float
    """lambda: the knee of G, as a share of the ridge point."""
    base: float
    """s, the base of G."""
    draft_bias: float
    draft_sequence: float
    reject_bias: float
    reject_sequence: float
    exposed: float
    """Share of the link's time that lengthens a pass; computation hides the rest."""
    bulk_from: int
    """Tokens from which a pass is a bulk pass, with PyTorch's matrix products instead of kernels; 0 for never."""
    bulk_bias: float
    bulk_token: float
    """Per token of a bulk pass."""
    bulk_exposed: float
    """As `exposed`, in a bulk pass."""


@dataclass(frozen=True)
class DraftGain:
    """The predicted gain of one draft length."""

    drafted: int
    """Drafted tokens per verification and sequence."""
    target_efficiency: float
    speedup: float
    """Tokens per second with drafts over those without."""


@dataclass(frozen=True)
class Outlook:
    """The prediction for one batch size."""

    batch: int
    tokens_per_second: float
    """Of all sequences together, without drafts."""
    experts: float
    """Experts per layer that a plain step requests."""
    hit_rate: float
    """Of a plain step, from 0 to 1."""
    drafts: tuple[DraftGain, ...]


@dataclass(frozen=True)
class PerformanceModel:
    """Predictions for one checkpoint on one machine. Hit rates are from 0 to 1; 1 means that nothing is missing."""

    shape: ModelShape
    speed: MachineSpeed
    routing: Routing
    locality: Locality
    times: Times

    # --- experts -----------------------------------------------------------------------------------

    def activated(self, batch: float, tokens: float = 1) -> float:
        """N: experts per layer that a pass requests."""
        return self.routing.activated(self.shape.top_k, batch, tokens)

    def hit_rate(self, cache_share: float, batch: float, tokens: float = 1) -> float:
        """The expected hit rate with slots for a share `cache_share` of the experts."""
        if cache_share >= 1:
            return 1.0
        return self.locality.hit_rate(cache_share, self.activated(batch, tokens) / self.shape.experts)

    # --- seconds -----------------------------------------------------------------------------------

    def step_seconds(self, batch: float, tokens: float = 1, hit_rate: float = 1.0) -> float:
        """T_T: seconds of a pass over `tokens` tokens of each of `batch` sequences; one token each is a plain step."""
        misses = self.shape.layers * self.activated(batch, tokens) * (1 - hit_rate)
        return self.pass_seconds(batch * tokens, self.activated(batch, tokens), misses)

    def pass_seconds(self, total: float, activated: float, misses: float) -> float:
        """Seconds of a pass over `total` tokens, with `activated` experts per layer and `misses` in all layers."""
        times = self.times
        link = misses * self.shape.record_nbytes / self.speed.link
        if times.bulk_from and total >= times.bulk_from:
            computing = times.bulk_bias + times.expert * activated + times.bulk_token * total
            return max(link, computing + times.bulk_exposed * link)
        computing = times.bias + times.expert * activated
        computing += times.token * self._growth(total)
        computing += times.load * self._growth(moesd.tokens_per_expert(self.shape.top_k, total, activated))
        return max(link, computing + times.exposed * link)

    def cycle_seconds(self, batch: float, gamma: int, hit_rate: float = 1.0) -> float:
        """Seconds of a cycle: drafting, verification and rollback of `gamma` drafted tokens per sequence."""
        draft, reject = self._draft_and_reject_seconds(batch)
        return draft + self.step_seconds(batch, gamma + 1, hit_rate) + reject

    # --- gains -------------------------------------------------------------------------------------

    def target_efficiency(
        self, batch: float, gamma: int, hit_rate: float = 1.0, verify_hit_rate: float | None = None
    ) -> float:
        """T_T(B, 1) / T_T(B, gamma); the hit rates are those of `speedup`."""
        return moesd.target_efficiency(*self._plain_and_verify(batch, gamma, hit_rate, verify_hit_rate))

    def speedup(
        self, batch: float, gamma: int, tokens: float, hit_rate: float = 1.0, verify_hit_rate: float | None = None
    ) -> float:
        """Tokens per second with drafts over those without, at `tokens` per cycle (see `moesd.tokens_per_cycle`).

        `verify_hit_rate` is the hit rate of a verification; None is that of a plain step.
        """
        draft, reject = self._draft_and_reject_seconds(batch)
        plain, verify = self._plain_and_verify(batch, gamma, hit_rate, verify_hit_rate)
        return moesd.speedup(tokens, plain, draft, verify, reject)

    def outlook(self, batch: int, cache_share: float, alpha: float, depths: Iterable[int]) -> Outlook:
        """The prediction for each draft length of `depths`, at an acceptance probability of `alpha`."""
        plain, gains = self.hit_rate(cache_share, batch), []
        for depth in depths:
            rates = plain, self.hit_rate(cache_share, batch, depth + 1)
            gain = self.speedup(batch, depth, moesd.tokens_per_cycle(alpha, depth), *rates)
            gains.append(DraftGain(depth, self.target_efficiency(batch, depth, *rates), gain))
        return Outlook(batch, self.tokens_per_second(batch, plain), self.activated(batch), plain, tuple(gains))

    def tokens_per_second(self, batch: float, hit_rate: float = 1.0, gamma: int = 0, tokens: float = 1.0) -> float:
        """Tokens per second of all sequences: in plain steps, or in cycles of `gamma` drafts and `tokens` tokens."""
        seconds = self.cycle_seconds(batch, gamma, hit_rate) if gamma else self.step_seconds(batch, 1, hit_rate)
        return batch * tokens / seconds

    def token_cost(self, batch: int, hit_rate: float = 1.0) -> float:
        """The cost of one more token in a step of `batch` sequences, as a share of the step's time; always above 0."""
        plain = self.step_seconds(batch, 1, hit_rate)
        more = (self.step_seconds(batch, 1 + 1 / batch, hit_rate) - plain) / plain
        # The added token may turn the step into a bulk pass, which can be faster: such a difference is no cost.
        return max(more, MIN_COST / batch)

    def _plain_and_verify(
        self, batch: float, gamma: int, hit_rate: float, verify_hit_rate: float | None
    ) -> tuple[float, float]:
        """Seconds of a plain step, and of a verification."""
        verify = hit_rate if verify_hit_rate is None else verify_hit_rate
        return self.step_seconds(batch, 1, hit_rate), self.step_seconds(batch, gamma + 1, verify)

    def _draft_and_reject_seconds(self, batch: float) -> tuple[float, float]:
        """Seconds of drafting before a verification, and of sampling and rollback after it.

        MoESD's gamma * T_D is one look-up per sequence here: an n-gram drafter finds all drafted tokens of a sequence
        at once, so that its time is linear in the batch and does not follow G.
        """
        times = self.times
        draft = times.draft_bias + times.draft_sequence * batch
        return draft, times.reject_bias + times.reject_sequence * batch

    def _growth(self, tokens: float) -> float:
        return moesd.growth(tokens, self.times.knee * self.speed.ridge(self.shape.itemsize), self.times.base)
