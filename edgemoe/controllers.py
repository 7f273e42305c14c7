"""How far each sequence of a batch is drafted for: a controller each where that is found out, else as was asked."""

from __future__ import annotations

from collections.abc import Mapping

from edgemoe.draft_settings import DraftSettings
from edgemoe.generation import Generation
from edgemoe.utility import SHORTEST_REST, Setting, UtilityController

SHORTER, LONGER = 0.5, 2.0
"""Plain steps: one that is shorter than a plain one by more than this, or longer for each node, counts as this."""


class Controllers:
    """The settings of all sequences. A new one begins with what was best for the one before it, and tests it."""

    def __init__(self, settings: DraftSettings, width: int) -> None:
        """`width` is how many tokens may follow a node at most; 1 where only chains can be verified."""
        self._most = Setting(settings.depth, width, bool(settings.drafters - {"ngram"}))
        self._controlled = settings.priced
        self._start, self._rest = self._most, SHORTEST_REST
        self._own: dict[Generation, UtilityController] = {}
        self._latest: UtilityController | None = None
        self._changes = 0

    @property
    def changes(self) -> int:
        """How often a setting has changed, of all sequences."""
        return self._changes + sum(controller.changes for controller in list(self._own.values()))

    @property
    def utility(self) -> float:
        """The utility of the latest sequence's setting; 1 while drafting rests, or before anything was measured.

        0 where nothing is controlled.
        """
        return self._latest.utility if self._latest else float(self._controlled)

    def describe(self) -> str:
        """The setting of the sequence that was drafted for last, in a few words."""
        if self._latest is None:
            return str(self._start)
        return self._latest.describe()

    def setting(self, generation: Generation) -> Setting | None:
        """What may be drafted for `generation` now; None while that rests."""
        if not self._controlled:
            return self._most
        if generation not in self._own:
            self._own[generation] = UtilityController(self._start, self._most, self._rest)
        self._latest = self._own[generation]
        return self._latest.setting

    def stepped(
        self, drafted: Mapping[Generation, int], made: Mapping[Generation, int], plain_steps: float | None
    ) -> None:
        """A step took the time of so many `plain_steps`; None where that is not known.

        `drafted` are the nodes of each sequence that decoded in it, and `made` the tokens that it got where there were
        any. What a step takes longer for drafts is shared by their nodes; and everybody waits for it.
        """
        nodes = sum(drafted.values())
        for generation, count in drafted.items():
            controller = self._own.get(generation)
            if controller is None:
                continue
            if controller.setting is None:
                controller.passed()
            elif plain_steps is not None:
                more = (plain_steps - 1) * count / nodes * len(drafted) if nodes else 0.0
                # In a large batch a breath of noise would be many steps.
                controller.saw(
                    count, made.get(generation, 1), 1 + min(max(more, -SHORTER), LONGER * count * len(drafted))
                )

    def forget(self, generation: Generation) -> None:
        """`generation` is over."""
        controller = self._own.pop(generation, None)
        if controller is not None:
            self._start, self._rest = controller.best, controller.rest
            self._changes += controller.changes
