"""One message of a conversation."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QHBoxLayout, QLabel, QSizePolicy, QVBoxLayout, QWidget

from examples.desktop.widgets import label, selectable

MAX_WIDTH = 600
"""Pixels: longer lines are hard to read."""


class MessageView(QWidget):
    """A text in a bubble: what was asked on the right, a reply on the left, with its reasoning and a note below."""

    def __init__(self, text: str, *, asked: bool) -> None:
        super().__init__()
        self.text = ""
        self.reasoning = ""
        self._text = selectable("", "text")
        self._reasoning = selectable("", "reasoning")
        self._reasoning.hide()
        self.note = label("", "note")
        self.note.hide()
        self._bubble = QWidget()
        self._bubble.setObjectName("asked" if asked else "replied")
        self._bubble.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self._bubble.setSizePolicy(QSizePolicy.Policy.Maximum, QSizePolicy.Policy.Minimum)
        column = QVBoxLayout(self._bubble)
        column.setContentsMargins(14, 10, 14, 10)
        for widget in (self._reasoning, self._text, self.note):
            column.addWidget(widget)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        if asked:
            row.addStretch(1)
            row.addWidget(self._bubble)
        else:
            row.addWidget(self._bubble)
            row.addStretch(1)
        self.append(text)

    def append(self, text: str, reasoning: str = "") -> None:
        """Adds a piece of the reply and of its reasoning."""
        self.text += text
        self.reasoning += reasoning
        for view, said in ((self._text, self.text), (self._reasoning, self.reasoning)):
            view.setText(said)
            view.setVisible(bool(said))
            view.setFixedWidth(_width(view))

    def annotate(self, note: str) -> None:
        """Says something about the message below it."""
        self.note.setText(note)
        self.note.setFixedWidth(_width(self.note))
        self.note.show()


def _width(view: QLabel) -> int:
    """Pixels for a text: those of its longest line, so that a short one has a small bubble."""
    view.ensurePolished()
    return min(MAX_WIDTH, view.fontMetrics().size(0, view.text()).width() + 2)
