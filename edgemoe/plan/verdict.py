"""What a profile says in two sentences: whether drafts pay, and what a reply waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgemoe.plan.prediction import ACCEPTANCE, DEPTHS
from edgemoe.plan.profile import Profile

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of sequences that people are told of."""
PAYS = 1.05
"""Speed-up from which on drafts are said to pay: a smaller one is within the error of a profile."""
MOST = 0.5
"""Share of the time from which on one cause is the bottleneck."""
DISTURBED = 0.3
"""Spread of a point (`ProfilePoint.spread`) from which on it is told of."""


@dataclass(frozen=True)
class Verdict:
    """Sentences for people."""

    drafts: str
    """With how many sequences drafts pay, and how much."""
    bottleneck: str
    """What one sequence waits for most, and what makes it faster."""
    disturbed: str
    """That other programs disturbed the measurement; empty where none did."""

    @property
    def sentences(self) -> tuple[str, ...]:
        """All that there is to say."""
        return tuple(sentence for sentence in (self.drafts, self.bottleneck, self.disturbed) if sentence)


def verdict(profile: Profile) -> Verdict:
    """The verdict for the slots that there were when the profile was taken."""
    share = max(point.cache_share for point in profile.points)
    return Verdict(_drafts(profile, share), _bottleneck(profile, share), _disturbed(profile))


def _drafts(profile: Profile, share: float) -> str:
    gains = {
        batch: max(gain.speedup for gain in profile.model.outlook(batch, share, ACCEPTANCE, DEPTHS).drafts)
        for batch in BATCHES
    }
    pay = [batch for batch in BATCHES if gains[batch] >= PAYS]
    right = f"if {ACCEPTANCE:.0%} of the drafted tokens are right"
    if not pay:
        best = max(gains, key=lambda batch: gains[batch])
        return f"drafts do not pay here, {right}: {gains[best]:.2f} x at best, with {_counted([best])}"
    best = max(pay, key=lambda batch: gains[batch])
    told = f"drafts pay with {_counted(pay)} ({gains[best]:.2f} x at best, with {best}), {right}"
    lose = [batch for batch in BATCHES if batch not in pay]
    return f"{told}, and do not with {_counted(lose)}" if lose else told


def _counted(batches: Sequence[int]) -> str:
    """Numbers of sequences in words; a run of the table is told by its ends."""
    runs: list[list[int]] = []
    for batch in batches:
        if runs and BATCHES.index(batch) == BATCHES.index(runs[-1][-1]) + 1:
            runs[-1].append(batch)
        else:
            runs.append([batch])
    told = " and ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"{told} sequence{'' if told == '1' else 's'}"


def _bottleneck(profile: Profile, share: float) -> str:
    model = profile.model
    shape, speed = model.shape, model.speed
    rate = model.hit_rate(share, 1)
    seconds, computing = model.step_seconds(1, 1, rate), model.step_seconds(1, 1)
    waiting = 1 - computing / seconds
    reading = (shape.dense_nbytes + shape.layers * model.activated(1) * shape.record_nbytes) / speed.memory
    fewer = "fewer bits (experts=)"
    if waiting >= MOST:
        link = "the link" if profile.card else "the disk"
        return (
            f"one sequence waits for {link} for {waiting:.0%} of its time: a larger expert_cache=, {fewer} or "
            f"a faster {'link' if profile.card else 'disk'} would help"
        )
    if reading / seconds >= MOST:
        return (
            f"one sequence reads memory for {min(1.0, reading / seconds):.0%} of its time: {fewer}, or more sequences "
            "at a time, which share what is read, would help"
        )
    cause = "launches and small operations" if profile.card else "computing and small operations"
    return f"one sequence spends most of its time on {cause}: more sequences at a time would help"


def _disturbed(profile: Profile) -> str:
    points = [point for point in profile.points if point.spread > DISTURBED]
    if 4 * len(points) < len(profile.points):
        return ""
    return (
        f"{len(points)} of {len(profile.points)} times differed by more than {DISTURBED:.0%} from pass to pass: other "
        "programs were busy, and a profile without them would be better"
    )
