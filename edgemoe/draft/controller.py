"""Speculation only while it pays: Cascade's utility (arXiv 2506.20675) and a controller for each sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from edgemoe.draft.settings import DraftSettings
from edgemoe.request.request import Request

TEST = 4
"""Cycles for which a setting is tested. The first one is not counted: it pays for the change of setting."""
HOLD = 32
"""Cycles for which the best setting holds before others are tested again."""
MEMORY = 16.0
"""Cycles over which a setting's utility is averaged, with decay."""
REMEMBERED = 0.25
"""Share that a setting's earlier cycles count for when it is tested again: the text has changed meanwhile."""
MAX_TRIALS = 4
"""Most settings in one test."""
SHORTEST_REST, LONGEST_REST = 16, 256
"""Fewest and most steps of a rest, in which nothing is drafted. A rest doubles each time, and a test follows it."""
TRIAL = 48
"""Tokens of a sequence for which drafting with passes, or without, is tried against the other."""
LONGEST_TERM = 32 * TRIAL
"""Most tokens between two trials. The time between them doubles while the same one wins."""
LEAST_TRIAL, QUIT = 16, 0.85
"""Tokens after which a trial may end early, and the share of the other one's utility that it ends below."""
PASS_MEMORY = 64.0
"""Cycles over which the utility with passes, and without, is averaged, with decay."""
IDLE = 24
"""Steps in a row without a node worth drafting, after which `describe` says so."""


class Setting(NamedTuple):
    """Bounds of one sequence's draft."""

    depth: int
    """Most drafted tokens that follow one another."""
    width: int
    """Most tokens that may follow a node; 1 is a chain."""
    passes: bool
    """Whether drafting passes are run, where a drafter runs them."""

    def __str__(self) -> str:
        shape = "chains" if self.width == 1 else "trees"
        return f"{shape} of depth {self.depth}{', with passes' if self.passes else ''}"


def utility(tokens: float, plain_steps: float) -> float:
    """Cascade's utility: `tokens` per cycle over the cycle's time in plain steps."""
    return tokens / max(plain_steps, 1e-9)


class Tally:
    """Tokens and cost of the cycles under one setting, with decay."""

    def __init__(self, memory: float = MEMORY) -> None:
        """`memory` is the number of cycles that the averages are taken over."""
        self.cycles = 0.0
        self._memory = memory
        self._tokens = 0.0
        self._plain_steps = 0.0

    def add(self, tokens: float, plain_steps: float) -> None:
        """One more cycle."""
        self.fade(1 - 1 / self._memory)
        self._plain_steps += plain_steps
        self._tokens += tokens
        # Last: before it, who reads this meanwhile finds nothing.
        self.cycles += 1

    def fade(self, keep: float) -> None:
        """Scales the weight of all cycles so far by `keep`."""
        self.cycles *= keep
        self._tokens *= keep
        self._plain_steps *= keep

    @property
    def utility(self) -> float:
        """The cycles' utility; 1 before there was one."""
        return utility(self._tokens, self._plain_steps) if self.cycles else 1.0


class UtilityController:
    """Chooses the setting of one sequence, or that it gets no draft, in three phases: test, hold, rest.

    A test measures the present setting and climbs from it: to a neighbour while that is better, to a smaller one where
    it does not pay. The best holds for a while. Where none pays drafting rests, longer each time, and is tested again.
    """

    def __init__(self, start: Setting, most: Setting, rest: int = SHORTEST_REST) -> None:
        """Begins with a test of `start`; no setting goes beyond `most`. The first rest takes `rest` steps."""
        self.changes = 0
        """Number of changes of the setting."""
        self._most = most
        self._setting: Setting | None = start
        self._last = start
        self._tallies: dict[Setting, Tally] = {}
        self._tried: dict[Setting, float] = {}
        self._turn = 0
        self.rest = rest
        """Steps of the next rest."""
        self._idle = 0
        self._testing, self._left, self._fresh = True, TEST, True

    @property
    def setting(self) -> Setting | None:
        """The bounds of a draft now; None while drafting rests."""
        return self._setting

    @property
    def best(self) -> Setting:
        """The setting that was best in the last test; the next sequence begins with it."""
        return self._last

    @property
    def utility(self) -> float:
        """The recent utility of the present setting; 1 while drafting rests."""
        setting = self._setting
        tally = self._tallies.get(setting) if setting else None
        return tally.utility if tally else 1.0

    def describe(self) -> str:
        """What is drafted now, in a few words."""
        setting = self._setting
        if setting is None:
            return "off: it did not pay"
        return f"{setting}, of which nothing is worth it now" if self._idle >= IDLE else str(setting)

    def permit(self, passes: bool) -> None:
        """Whether drafting passes may be run from now on; a change begins a test."""
        if passes != self._most.passes:
            self._most = self._most._replace(passes=passes)
            self._last = self._last._replace(passes=passes)
            self._tallies = {}
            self._begin_test()

    def passed(self) -> None:
        """Counts a step of a rest."""
        self._left -= 1
        if self._left <= 0:
            self._begin_test()

    def observe(self, drafted: int, tokens: int, plain_steps: float) -> None:
        """A cycle under the setting: `drafted` nodes gave `tokens` in the time of so many plain steps.

        A step for which nothing was worth drafting has nothing to tell.
        """
        if self._setting is None:
            return
        self._idle = 0 if drafted else self._idle + 1
        if not drafted:
            return
        if self._fresh:
            self._fresh = False
            return
        self._tallies.setdefault(self._setting, Tally()).add(tokens, plain_steps)
        self._left -= 1
        if self._testing:
            if self._left <= 0:
                self._judge()
        elif self._left <= 0 or self.utility < 1:
            self._begin_test()

    # --- phases ------------------------------------------------------------------------------------

    def _begin_test(self) -> None:
        self._testing, self._tried = True, {}
        self._try(self._last)

    def _try(self, setting: Setting) -> None:
        if setting != self._setting and setting in self._tallies:
            self._tallies[setting].fade(REMEMBERED)
        self._change(setting, TEST)

    def _judge(self) -> None:
        """Ends the trial of a setting: another one is tested, or the best one is kept."""
        assert self._setting is not None
        self._tried[self._setting] = self.utility
        following = self._next_trial(self._setting)
        if following is not None:
            self._try(following)
            return
        self._testing = False
        # Where none pays the next test begins with what lost least.
        self._last = max(self._tried, key=lambda setting: self._tried[setting])
        if self._tried[self._last] < 1:
            self._change(None, self.rest)
            self.rest = min(2 * self.rest, LONGEST_REST)
        else:
            self.rest = SHORTEST_REST
            self._change(self._last, HOLD)

    def _next_trial(self, setting: Setting) -> Setting | None:
        """The setting to test next: a smaller one while none pays, a neighbour while `setting` is best, else None."""
        if len(self._tried) >= MAX_TRIALS:
            return None
        best = max(self._tried.values())
        near = [other for other in self._neighbours(setting) if other not in self._tried]
        if best < 1:
            near = [other for other in near if other < setting][:1]
        elif self._tried[setting] < best:
            return None
        self._turn += 1
        return near[self._turn % len(near)] if near else None

    def _neighbours(self, setting: Setting) -> list[Setting]:
        """Settings that differ in one bound; of the smaller ones the one that saves most comes first."""
        found = [
            setting._replace(passes=self._most.passes and not setting.passes),
            setting._replace(depth=max(1, setting.depth // 2)),
            setting._replace(depth=min(self._most.depth, 2 * setting.depth)),
            setting._replace(width=1 if setting.width > 1 else self._most.width),
        ]
        return [other for other in dict.fromkeys(found) if other != setting]

    def _change(self, setting: Setting | None, left: int) -> None:
        self._left = left
        if setting != self._setting:
            self.changes += 1
            self._fresh, self._idle = True, 0
            self._setting = setting


class PassTrials:
    """Whether drafting passes are run now: doing with them and doing without are compared over all sequences.

    A sequence's own test compares with plain steps, and short replies end before it does. What passes have to gain on
    is drafting without them, so both are measured in turns: a trial of the other one follows each term of what is
    better, and terms grow while nothing changes.
    """

    def __init__(self, passes: bool) -> None:
        """`passes` is what comes first."""
        self.passes = passes
        """Whether they are run now."""
        self._tallies = {True: Tally(PASS_MEMORY), False: Tally(PASS_MEMORY)}
        self._trial = True
        self._left = float(TRIAL)
        self._seen = 0.0
        self._term = TRIAL
        self._winner: bool | None = None

    def observe(self, tokens: float, plain_steps: float) -> None:
        """A step gave each sequence `tokens` on average, in the time of so many plain steps."""
        self._tallies[self.passes].add(tokens, plain_steps)
        self._left -= tokens
        self._seen += tokens
        if self._left <= 0 or self._fails():
            self._judge()

    def _fails(self) -> bool:
        own, other = self._tallies[self.passes], self._tallies[not self.passes]
        return self._seen >= LEAST_TRIAL and other.cycles > 0 and own.utility < QUIT * other.utility

    def _judge(self) -> None:
        """Ends a trial or a term."""
        other = not self.passes
        if not self._tallies[other].cycles or (not self._trial and not self._fails()):
            self._begin(other, trial=True, tokens=TRIAL)
            return
        # Equal is no gain: passes take memory and bytes as well.
        winner = self._tallies[True].utility > self._tallies[False].utility
        self._term = min(2 * (self._term if winner == self._winner else TRIAL), LONGEST_TERM)
        self._winner = winner
        self._begin(winner, trial=False, tokens=self._term)

    def _begin(self, passes: bool, *, trial: bool, tokens: int) -> None:
        if trial:
            self._tallies[passes].fade(REMEMBERED)
        self.passes, self._trial, self._left, self._seen = passes, trial, tokens, 0.0


SHORTER, LONGER = 0.5, 2.0
"""Bounds on a step's deviation from a plain step, in plain steps: below it, and above it for each drafted node."""


class Controllers:
    """The settings of all sequences. A new sequence begins with a test of the setting that was best before."""

    def __init__(self, settings: DraftSettings, width: int, loads: Callable[[], bool] = lambda: False) -> None:
        """`width` is the most children of a node; 1 where only chains can be verified.

        `loads` tells whether passes have to load experts. Each drafted token then may cost more than it saves, and
        drafting passes have to show first that they pay.
        """
        self._most = Setting(settings.depth, width, bool(settings.drafters - {"ngram"}))
        self._controlled = settings.priced
        self._start, self._rest = self._most, SHORTEST_REST
        self._own: dict[Request, UtilityController] = {}
        self._latest: UtilityController | None = None
        self._changes = 0
        self._loads = loads
        self._trials: PassTrials | None = None

    @property
    def changes(self) -> int:
        """Number of changes of settings, over all sequences."""
        return self._changes + sum(controller.changes for controller in list(self._own.values()))

    @property
    def utility(self) -> float:
        """The utility of the latest sequence's setting; 1 while drafting rests, or before anything was measured.

        0 where nothing is controlled.
        """
        return self._latest.utility if self._latest else float(self._controlled)

    def describe(self) -> str:
        """The setting of the sequence that had the latest draft, in a few words."""
        if self._latest is None:
            return str(self._start)
        return self._latest.describe()

    def setting(self, request: Request) -> Setting | None:
        """The bounds of a draft for `request` now; None while drafting rests for it."""
        if not self._controlled:
            return self._most
        passes = self._passes()
        if request not in self._own:
            start, most = (each._replace(passes=passes) for each in (self._start, self._most))
            self._own[request] = UtilityController(start, most, self._rest)
        self._latest = self._own[request]
        self._latest.permit(passes)
        return self._latest.setting

    def _passes(self) -> bool:
        """Whether drafting passes are run now."""
        if not self._most.passes:
            return False
        if self._trials is None:
            self._trials = PassTrials(not self._loads())
        return self._trials.passes

    def stepped(self, drafted: Mapping[Request, int], made: Mapping[Request, int], plain_steps: float | None) -> None:
        """A step took the time of so many `plain_steps`; None where that is not known.

        `drafted` are the nodes of each sequence that decoded in it, and `made` the tokens that it got where there were
        any. What a step takes longer for drafts is shared by their nodes; and everybody waits for it.
        """
        nodes = sum(drafted.values())
        if self._trials is not None and plain_steps is not None and drafted:
            tokens = sum(made.get(request, 1) for request in drafted) / len(drafted)
            took = min(max(plain_steps, SHORTER), 1 + LONGER * nodes) if nodes else 1.0
            self._trials.observe(tokens, took)
        for request, count in drafted.items():
            controller = self._own.get(request)
            if controller is None:
                continue
            if controller.setting is None:
                controller.passed()
            elif plain_steps is not None:
                more = (plain_steps - 1) * count / nodes * len(drafted) if nodes else 0.0
                # In a large batch a breath of noise would be many steps.
                controller.observe(
                    count, made.get(request, 1), 1 + min(max(more, -SHORTER), LONGER * count * len(drafted))
                )

    def forget(self, request: Request) -> None:
        """Drops the controller of a finished request; its best setting is the start of the next."""
        controller = self._own.pop(request, None)
        if controller is not None:
            self._start, self._rest = controller.best, controller.rest
            self._changes += controller.changes
