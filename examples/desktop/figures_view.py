"""What the engine does, as it does it: its cache, its drafts, its speed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from PySide6.QtCore import QPointF, QSize, Qt
from PySide6.QtGui import QColor, QPainter, QPaintEvent, QPen, QPolygonF
from PySide6.QtWidgets import QHBoxLayout, QSizePolicy, QVBoxLayout, QWidget

from edgemoe import Stats
from examples.desktop.style import ACCENT
from examples.desktop.widgets import label

POINTS = 60
"""Of each curve; one a poll."""


class Curve(QWidget):
    """The last values of a figure, from 0 upwards."""

    def __init__(self) -> None:
        super().__init__()
        self.values: deque[float] = deque(maxlen=POINTS)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)

    def sizeHint(self) -> QSize:
        return QSize(60, 22)

    def add(self, value: float) -> None:
        self.values.append(value)
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:
        if len(self.values) < 2:
            return
        top, step = max(*self.values, 1e-9), self.width() / (POINTS - 1)
        height = self.height() - 4
        first = POINTS - len(self.values)
        points = [
            QPointF(step * (first + index), 2 + height * (1 - value / top)) for index, value in enumerate(self.values)
        ]
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setPen(QPen(QColor(ACCENT), 1.6))
        painter.drawPolyline(QPolygonF(points))


class Tile(QWidget):
    """One figure, its name, what it is of, and its curve."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.setObjectName("tile")
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self.figure, self.of, self.curve = label("–", "figure"), label("", "note"), Curve()
        column = QVBoxLayout(self)
        column.setContentsMargins(12, 8, 12, 8)
        column.setSpacing(1)
        for widget in (label(name, "heading"), self.figure, self.of, self.curve):
            column.addWidget(widget)

    def show_figure(self, figure: str, of: str, value: float) -> None:
        self.figure.setText(figure)
        self.of.setText(of)
        self.curve.add(value)


class FiguresView(QWidget):
    """Polled: a reading is the totals since loading, and what is shown is between two of them, or since loading."""

    def __init__(self) -> None:
        super().__init__()
        self.speed, self.hits, self.moved, self.drafts = map(
            Tile, ("TOKENS PER SECOND", "EXPERT HITS", "EXPERTS LOADED", "DRAFTS ACCEPTED")
        )
        self._last: tuple[float, Stats] | None = None
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        for tile in self.tiles:
            row.addWidget(tile, 1)

    @property
    def tiles(self) -> Sequence[Tile]:
        return (self.speed, self.hits, self.moved, self.drafts)

    def clear(self) -> None:
        """Without a model there is nothing to show."""
        self._last = None
        for tile in self.tiles:
            tile.figure.setText("–")
            tile.of.setText("")
            tile.curve.values.clear()
            tile.curve.update()

    def add(self, stats: Stats, now: float) -> None:
        """Shows `stats`, read at the time `now`, seconds. While nothing is generated the last figures stay."""
        # A first reply may be over before the first look.
        last, self._last = self._last or (now - stats.seconds, Stats()), (now, stats)
        if stats.steps == last[1].steps:
            if stats.steps == 0:
                self.hits.of.setText(f"{stats.slots} of {stats.experts} experts fit")
            return
        seconds, before = now - last[0], last[1]
        speed = (stats.tokens_generated - before.tokens_generated) / max(seconds, 1e-9)
        self.speed.show_figure(f"{speed:.0f}", f"{stats.tokens_generated} tokens since loading", speed)
        asked = stats.hits + stats.misses - before.hits - before.misses
        hits = (stats.hits - before.hits) / max(1, asked)
        self.hits.show_figure(f"{hits:.0%}", f"{stats.slots} of {stats.experts} experts fit", hits)
        moved = (stats.bytes_loaded - before.bytes_loaded) / max(seconds, 1e-9) / (1 << 20)
        self.moved.show_figure(f"{moved:.0f} MiB/s", f"{stats.bytes_loaded / (1 << 20):.0f} MiB since loading", moved)
        drafted = stats.drafted - before.drafted
        share = (stats.accepted - before.accepted) / max(1, drafted)
        of = f"{stats.tokens_per_cycle:.1f} tokens a verification" if stats.cycles else stats.speculation
        self.drafts.show_figure(f"{share:.0%}" if drafted else "–", of, share)
