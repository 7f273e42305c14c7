"""What decoding steps cost in seconds, measured while they run: a plain step, an extra token in it, a drafting pass.

A plain step computes one token per sequence. Everything beyond that, in a step that verifies drafts, is extra tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from edgemoe.draft.token_curve import TokenCurve

PRIOR_TOKEN_COST = 0.35
"""Cost of one extra token for one sequence before it is measured, as a fraction of a plain step's time."""
PRIOR_SHARING = 0.25
"""That fraction falls with the power 1 + `PRIOR_SHARING` of the number of sequences: many need most experts anyway."""
MAX_PROFILED_COST = 0.6
"""Cap on the profile's prior, as such a fraction times the number of sequences.

Almost certain tokens are then always drafted, and so the cost of an extra token is measured.
"""
PRIOR_WEIGHT = 16.0
"""Measured tokens that the prior counts for. The prior regains weight while no tokens are measured."""
AVERAGED_STEPS = 32.0
"""Steps in the running average of a plain step."""
REMEASURE_AFTER = 64
"""Consecutive steps with drafts after which a plain step is due: the value of drafts is relative to its time."""
RETRY_AFTER = 8
"""Steps after which a plain step is due again when none was possible."""
MAX_SIZE_RATIO = 1.35
"""Ratio of two numbers of sequences up to which a step of one is an estimate for the other."""
OUTLIER_RATIO = 2.0
"""Cap on the ratio between a measured time and the average, either way: other programs disturb measurements."""


class StepCost:
    """The cost of steps for about the same number of sequences."""

    def __init__(self, prior: float = PRIOR_TOKEN_COST) -> None:
        """`prior` is the cost of one extra token before it is measured, as a fraction of a plain step's time."""
        self._prior = prior
        self.seconds = 0.0
        """Seconds of a plain step; 0 before one is measured."""
        self._warm = False
        self._measured = 0
        self._steps_since = 0
        self._waited = 0.0
        self._extra_seconds = 0.0
        self._extra_waited = 0.0
        self._extra_tokens = 0.0
        self._curve = TokenCurve()

    @property
    def measured(self) -> bool:
        """Whether plain steps of this number of sequences were measured: `borrow` does not count."""
        return self._measured > 0

    def borrow(self, other: StepCost) -> None:
        """Takes over the costs of `other` until a plain step is measured here, and makes one due."""
        self.seconds, self._waited, self._steps_since = other.seconds, other._waited, REMEASURE_AFTER
        self._extra_seconds, self._extra_waited = other._extra_seconds, other._extra_waited
        self._extra_tokens = other._extra_tokens
        self._curve.take_over(other._curve)

    def observe(self, seconds: float, waited: float = 0.0) -> None:
        """A plain step took `seconds`, `waited` of them for the link. Without a known cost the first is a warm-up."""
        self._steps_since = 0
        if not self.seconds and not self._warm:
            self._warm = True
            return
        if self._measured:
            seconds = min(max(seconds, self.seconds / OUTLIER_RATIO), self.seconds * OUTLIER_RATIO)
        self._measured += 1
        self.seconds += (seconds - self.seconds) / min(self._measured, AVERAGED_STEPS)
        self._waited += (min(waited, seconds) - self._waited) / min(self._measured, AVERAGED_STEPS)
        self._fade(1 / (4 * AVERAGED_STEPS))

    def observe_extra(self, tokens: int, seconds: float, waited: float = 0.0, *, sequences: int = 1) -> None:
        """A step with `tokens` extra tokens took `seconds`, `waited` of them for the link."""
        self._steps_since += 1
        self._fade(tokens / (4 * AVERAGED_STEPS + tokens))
        if seconds < self.seconds:
            # A plain step would have taken no longer: the plain steps that were measured were disturbed.
            weight = min(self._measured + 1, AVERAGED_STEPS) if self._measured else AVERAGED_STEPS
            self.seconds += (seconds - self.seconds) / weight
            self._waited = min(self._waited, self.seconds)
        extra = min(max(0.0, seconds - self.seconds), OUTLIER_RATIO * tokens * self.seconds)
        self._extra_tokens += tokens
        self._extra_seconds += extra
        self._extra_waited += min(max(0.0, waited - self._waited), extra)
        self._curve.observe(tokens / sequences, tokens, extra)

    def skip(self) -> None:
        """A plain step was possible and was not run."""
        self._steps_since += 1

    def is_due(self) -> bool:
        """Whether a plain step is due. After a True it is False for the next `RETRY_AFTER` steps."""
        due = self._steps_since >= REMEASURE_AFTER
        if due:
            self._steps_since = REMEASURE_AFTER - RETRY_AFTER
        return due

    @property
    def token(self) -> float:
        """Seconds that one extra token costs on average."""
        prior = PRIOR_WEIGHT * self._prior * self.seconds
        return (self._extra_seconds + prior) / (self._extra_tokens + PRIOR_WEIGHT)

    @property
    def computing(self) -> float:
        """Seconds that one extra token costs without its waits for the link."""
        prior = PRIOR_WEIGHT * self._prior * (self.seconds - self._waited)
        return (self._extra_seconds - self._extra_waited + prior) / (self._extra_tokens + PRIOR_WEIGHT)

    def extra(self, tokens: int) -> float:
        """Seconds that `tokens` extra tokens of a sequence cost."""
        return self._curve.cost(tokens, self.token)

    def next_token(self, drafted: int) -> float:
        """Seconds that one more extra token costs a sequence that has `drafted` already."""
        return self._curve.next_token(drafted, self.token)

    def _fade(self, share: float) -> None:
        self._extra_seconds *= 1 - share
        self._extra_waited *= 1 - share
        self._extra_tokens *= 1 - share
        self._curve.fade(share)


class CycleCost:
    """The costs of steps and drafting passes by the number of sequences."""

    def __init__(self, prior: Callable[[int], float] | None = None) -> None:
        """`prior(sequences)`, from a profile of this machine, is the prior of `StepCost`; None is a default."""
        self._profiled = prior
        self._steps: dict[int, StepCost] = {}
        self._drafting: dict[int, StepCost] = {}

    def of(self, sequences: int) -> StepCost:
        """The cost of steps for `sequences`; similar numbers of sequences share one."""
        size = _size_class(sequences)
        if size not in self._steps:
            self._steps[size] = StepCost(self._prior(sequences))
        if not self._steps[size].seconds:
            self._borrow(size)
        return self._steps[size]

    def observe_step(self, sequences: int, tokens: int, seconds: float, waited: float = 0.0) -> None:
        """A step of `tokens` tokens, for `sequences` that decode, took `seconds`, `waited` of them for the link."""
        cost = self.of(sequences)
        if tokens == sequences:
            cost.observe(seconds, waited)
        elif cost.seconds:
            cost.observe_extra(tokens - sequences, seconds, waited, sequences=sequences)

    def observe_draft(self, sequences: int, seconds: float) -> None:
        """A drafting pass for `sequences` took `seconds`."""
        self._drafting.setdefault(_size_class(sequences), StepCost()).observe(seconds)

    def draft_pays(self, sequences: int, gain: float) -> bool:
        """Whether a drafting pass for `sequences` takes no longer than the `gain` seconds that it saves.

        True before a pass is measured. Passes that have not paid for a while are forgotten, and so measured again.
        """
        size = _size_class(sequences)
        passes = self._drafting.setdefault(size, StepCost())
        if gain < passes.seconds:
            passes.skip()
            if passes.is_due():
                passes = self._drafting[size] = StepCost()
        return gain >= passes.seconds

    def _prior(self, sequences: int) -> float:
        if self._profiled is None:
            return PRIOR_TOKEN_COST / math.pow(sequences, 1 + PRIOR_SHARING)
        return min(self._profiled(sequences), MAX_PROFILED_COST / sequences)

    def _borrow(self, size: int) -> None:
        """Lets `size` borrow from the closest measured number of sequences, if within `MAX_SIZE_RATIO`."""
        measured = [other for other, cost in self._steps.items() if cost.measured]
        closest = min(measured, key=lambda other: abs(math.log(other / size)), default=None)
        if closest is not None and max(closest / size, size / closest) <= MAX_SIZE_RATIO:
            self._steps[size].borrow(self._steps[closest])


def _size_class(sequences: int) -> int:
    """The smallest number of sequences that shares its costs with `sequences`: from 8 on, four classes per octave."""
    return sequences if sequences < 8 else int(8 * 2 ** (int(4 * math.log2(sequences / 8)) / 4))
