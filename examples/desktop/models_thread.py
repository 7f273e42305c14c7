"""The thread that looks for models and plans for them, also while another one answers."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import Signal

import edgemoe
from edgemoe import EdgeMoEError
from examples.desktop.job_thread import JobThread


class ModelsThread(JobThread):
    """Every method returns at once; what comes of it is told by a signal."""

    found = Signal(object)
    """A model on this machine, a `FoundModel`."""
    searched = Signal()
    """There are no more models."""
    planned = Signal(object)
    """The plan that was asked for last."""
    unplanned = Signal(str)
    """Why there is none, and what mends that."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0
        self._ended = False

    def find(self, folders: list[str]) -> None:
        """Looks into the Hugging Face cache and into `folders`."""
        self.submit(lambda: self._find(folders))

    def plan(self, model: str | None, settings: dict[str, Any]) -> None:
        """Plans for `model`; the plans that were asked for before are not told any more."""
        self._asked += 1
        number = self._asked
        self.submit(lambda: self._plan(number, model, settings))

    def end(self) -> None:
        self._ended = True
        super().end()

    def _find(self, folders: list[str]) -> None:
        for model in edgemoe.find_models(folders):
            if self._ended:
                return
            self.found.emit(model)
        self.searched.emit()

    def _plan(self, number: int, model: str | None, settings: dict[str, Any]) -> None:
        if number != self._asked or self._ended:
            return
        try:
            plan = edgemoe.Engine.plan_for(model, **settings)
        except EdgeMoEError as error:
            if number == self._asked:
                self.unplanned.emit(str(error))
            return
        if number == self._asked:
            self.planned.emit(plan)
