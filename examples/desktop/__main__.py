"""Starts the program; a model that is named is chosen at once."""

from __future__ import annotations

import sys

from PySide6.QtWidgets import QApplication

from examples.desktop.style import STYLE
from examples.desktop.window import Window


def main() -> int:
    application = QApplication(sys.argv)
    application.setApplicationName("edgemoe")
    application.setStyle("Fusion")
    application.setStyleSheet(STYLE)
    window = Window()
    if len(sys.argv) > 1:
        window.models.choose(sys.argv[1])
    window.show()
    return application.exec()


if __name__ == "__main__":
    sys.exit(main())
