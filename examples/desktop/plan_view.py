"""Where everything of a model would go, or why it does not fit."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QGridLayout, QLabel, QVBoxLayout, QWidget

from edgemoe import Plan
from examples.desktop.widgets import label, selectable


class PlanView(QWidget):
    """The rows of a plan: what, how much, and below them where or why."""

    def __init__(self) -> None:
        super().__init__()
        self.problem = selectable("", "problem")
        self._waiting = label("", "hint")
        self._labels: list[QLabel] = []
        self._rows = QWidget()
        self._grid = QGridLayout(self._rows)
        self._grid.setContentsMargins(0, 0, 0, 0)
        self._grid.setVerticalSpacing(1)
        self._grid.setColumnStretch(0, 1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for each in (self._waiting, self.problem, self._rows):
            layout.addWidget(each)
        self.wait()

    @property
    def texts(self) -> list[str]:
        """What is shown."""
        return [each.text() for each in self._labels]

    def wait(self) -> None:
        """Shows that a plan is being made."""
        self._waiting.setText("Planning …")
        self._waiting.show()
        self.problem.hide()

    def refuse(self, sentence: str) -> None:
        """Shows why there is no plan, and what mends that."""
        self.problem.setText(sentence)
        self.problem.show()
        self._waiting.hide()
        self._rows.hide()

    def show_plan(self, plan: Plan) -> None:
        """Shows `plan`."""
        self._waiting.hide()
        self.problem.hide()
        for old in self._labels:
            self._grid.removeWidget(old)
            old.deleteLater()
        self._labels = []
        for number, (what, how_much, where) in enumerate(plan.lines()):
            name, amount, why = label(what), label(how_much), label(where, "note")
            amount.setAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignTop)
            why.setContentsMargins(0, 0, 0, 5)
            self._grid.addWidget(name, 2 * number, 0)
            self._grid.addWidget(amount, 2 * number, 1)
            self._grid.addWidget(why, 2 * number + 1, 0, 1, 2)
            self._labels += [name, amount, why]
        self._rows.show()
