"""The n-gram drafters of all sequences, and the memory of replies that they share."""

from __future__ import annotations

from collections.abc import Iterable

from edgemoe.draft.ngram_drafter import NgramCalibration, NgramDrafter, NgramFrontier
from edgemoe.draft.reply_memory import ReplyMemory
from edgemoe.model.draft_tree import DraftTree
from edgemoe.request.request import Request


class NgramDrafters:
    """One `NgramDrafter` for each request; all draft from one another's replies too."""

    def __init__(self) -> None:
        self._drafters: dict[Request, NgramDrafter] = {}
        self._finished: list[Request] = []
        self._calibration = NgramCalibration()
        self.replies = ReplyMemory()

    def read(self, running: Iterable[Request]) -> None:
        """Lets every drafter read what its request has written, also for requests that get no draft now."""
        requests = [*self._finished, *running]
        for request in requests:
            drafter = self._drafters.get(request)
            if drafter is None:
                drafter = self._drafters[request] = NgramDrafter(self._calibration, request.ends, self.replies)
                drafter.read(request.tokens[: request.prompt_length])
            drafter.learn(request.tokens[len(drafter) :])
        for request in requests:
            self._drafters[request].publish()
        for request in self._finished:
            del self._drafters[request]
        self._finished.clear()

    def frontier(
        self, request: Request, tree: DraftTree, *, branching: bool, max_depth: int, min_probability: float
    ) -> NgramFrontier:
        """The candidates for `tree`, best first. The drafter must have read what `request` has written."""
        return self._drafters[request].frontier(
            tree, branching=branching, max_depth=max_depth, min_probability=min_probability
        )

    def finish(self, request: Request) -> None:
        """`request` has finished: its last tokens enter the reply memory at the next `read`."""
        if request in self._drafters and request not in self._finished:
            self._finished.append(request)

    def clear(self) -> None:
        """Drops everything that was read."""
        self._drafters.clear()
        self._finished.clear()
        self.replies = ReplyMemory()
