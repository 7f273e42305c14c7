"""Small widgets that the views share."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QLabel, QPushButton


def label(text: str, name: str = "") -> QLabel:
    """A text that wraps, as it is: what a model or a file says is never read as markup."""
    made = QLabel(text)
    made.setObjectName(name)
    made.setTextFormat(Qt.TextFormat.PlainText)
    made.setWordWrap(True)
    return made


def selectable(text: str, name: str = "") -> QLabel:
    """The same, to copy from."""
    made = label(text, name)
    made.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
    return made


def button(text: str, name: str = "") -> QPushButton:
    made = QPushButton(text)
    made.setObjectName(name)
    return made
