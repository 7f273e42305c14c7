"""How the program looks."""

from __future__ import annotations

from pathlib import Path

ARROW = (Path(__file__).parent / "down.svg").as_posix()
STYLE = """
* { font-family: Inter, "Segoe UI", "Noto Sans", sans-serif; font-size: 13px; color: #1c2330; }
QMainWindow, #chat, #transcript, #transcript > QWidget > QWidget { background: #f5f6f9; }
#sidebar { background: #ffffff; border-right: 1px solid #e1e5ec; }
QScrollArea { border: none; background: transparent; }
#sidebar QScrollArea > QWidget > QWidget { background: #ffffff; }
QToolTip { background: #1c2330; color: #ffffff; border: none; padding: 4px; }

#heading { font-size: 11px; font-weight: 600; color: #6b7689; }
#title { font-size: 15px; font-weight: 600; }
#subtitle, #hint, #note { color: #6b7689; }
#hint { font-size: 12px; }
#note { font-size: 11px; }
#problem { background: #fdecec; border: 1px solid #f3b7b7; border-radius: 8px; padding: 8px 10px; color: #8a1f1f; }

QComboBox, QSpinBox, QPlainTextEdit {
    background: #ffffff; border: 1px solid #cfd6e1; border-radius: 8px; padding: 6px 8px;
    selection-background-color: #2f6fed; selection-color: #ffffff;
}
QComboBox:focus, QSpinBox:focus, QPlainTextEdit:focus { border: 1px solid #2f6fed; }
QComboBox:disabled, QSpinBox:disabled, QPlainTextEdit:disabled { background: #f5f6f9; color: #9aa3b2; }
QSpinBox::up-button, QSpinBox::down-button { width: 0; border: none; }
QComboBox::drop-down { border: none; width: 26px; }
QComboBox::down-arrow { image: url("ARROW"); width: 12px; height: 8px; }
QComboBox QLineEdit { border: none; padding: 0; background: transparent; }
QComboBox QAbstractItemView { background: #ffffff; border: 1px solid #cfd6e1; selection-background-color: #e6eefe; }

QPushButton {
    background: #ffffff; border: 1px solid #cfd6e1; border-radius: 8px; padding: 7px 14px; font-weight: 500;
}
QPushButton:hover { background: #f0f3f8; }
QPushButton:disabled { color: #9aa3b2; background: #f5f6f9; }
QPushButton#primary { background: #2f6fed; border: 1px solid #2f6fed; color: #ffffff; }
QPushButton#primary:hover { background: #255cc9; }
QPushButton#primary:disabled { background: #b9cdf8; border: 1px solid #b9cdf8; }

QProgressBar { background: #e6eaf1; border: none; border-radius: 3px; max-height: 6px; }
QProgressBar::chunk { background: #2f6fed; border-radius: 3px; }

#asked { background: #2f6fed; border-radius: 14px; }
#asked QLabel { color: #ffffff; font-size: 14px; }
#replied { background: #ffffff; border: 1px solid #e1e5ec; border-radius: 14px; }
#replied #text { font-size: 14px; }
#replied #reasoning { color: #6b7689; font-style: italic; }

#tile { background: #ffffff; border: 1px solid #e1e5ec; border-radius: 10px; }
#tile #figure { font-size: 17px; font-weight: 600; }
QScrollBar:vertical { background: transparent; width: 10px; margin: 2px; }
QScrollBar::handle:vertical { background: #cfd6e1; border-radius: 3px; min-height: 30px; }
QScrollBar::add-line, QScrollBar::sub-line, QScrollBar::add-page, QScrollBar::sub-page { background: none; height: 0; }
""".replace("ARROW", ARROW)
"""Every colour is set, so that a dark desktop changes none of them alone."""
ACCENT = "#2f6fed"
