"""A conversation, and the field to go on with it."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import Qt, QTimer, Signal
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import QHBoxLayout, QPlainTextEdit, QScrollArea, QVBoxLayout, QWidget

from edgemoe import Chunk, Timings
from examples.desktop.message_view import MessageView
from examples.desktop.widgets import button, label, selectable

FLUSH_MS = 40
"""How often what has come of a reply is drawn: a window that is drawn for each token would be the slower of the two."""


class Field(QPlainTextEdit):
    """Enter sends, Shift+Enter is a line."""

    sent = Signal()

    def keyPressEvent(self, event: QKeyEvent) -> None:
        enter = event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter)
        if enter and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier:
            self.sent.emit()
        else:
            super().keyPressEvent(event)


class ChatView(QWidget):
    """The right side of the window. `messages` is the conversation as the engine takes it."""

    wanted_reply = Signal()
    """The last of `messages` is new."""
    wanted_stop = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.setObjectName("chat")
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self.messages: list[dict[str, Any]] = []
        self.title, self.used = label("No model is loaded", "title"), label("", "subtitle")
        self.problem = selectable("", "problem")
        self.problem.hide()
        self.field = Field()
        self.field.setPlaceholderText("Ask something")
        self.field.setFixedHeight(72)
        self.send, self.stop, self.clear = button("Send", "primary"), button("Stop"), button("New conversation")
        self._views: list[MessageView] = []
        self._reply: MessageView | None = None
        self._pending: list[Chunk] = []
        self._context = 0
        self._timer = QTimer(self, interval=FLUSH_MS)
        self._timer.timeout.connect(self.flush)
        self._lay_out()
        self.field.sent.connect(self.ask)
        self.send.clicked.connect(self.ask)
        self.stop.clicked.connect(self.wanted_stop)
        self.clear.clicked.connect(self.start_anew)
        self.show_closed()

    @property
    def replying(self) -> bool:
        """Whether a reply has begun and not ended."""
        return self._reply is not None

    # --- what the window tells --------------------------------------------------------------------

    def show_closed(self) -> None:
        """No model is loaded."""
        self.title.setText("No model is loaded")
        self.used.setText("Choose one on the left, and load it")
        self._show(ready=False)

    def show_open(self, model: str, context: int) -> None:
        """A model waits for questions, with at most `context` tokens in a conversation."""
        self._context = context
        self.title.setText(model)
        self.start_anew()
        self._show(ready=True)
        self.field.setFocus()

    def show_reading(self, done: int, tokens: int) -> None:
        """So many of the conversation's tokens are computed, of those before the reply."""
        self.used.setText(f"Reading: {done} of {tokens} tokens")

    def add(self, chunk: Chunk) -> None:
        """A piece of the reply."""
        self._pending.append(chunk)
        if chunk.finish_reason is not None:
            self.flush()
            self._finish(chunk)

    def refuse(self, sentence: str) -> None:
        """There is no reply: what was asked goes back into the field."""
        self.flush()
        self.problem.setText(sentence)
        self.problem.show()
        reply, self._reply = self._reply, None
        if reply is not None and not reply.text:
            for view in (reply, self._views[-2]):
                self._views.remove(view)
                view.deleteLater()
            self.field.setPlainText(self.messages.pop()["content"])
        self._show(ready=True)

    # --- what the user does -----------------------------------------------------------------------

    def ask(self) -> None:
        text = self.field.toPlainText().strip()
        if not text or not self.send.isEnabled():
            return
        self.problem.hide()
        self.field.clear()
        self.messages.append({"role": "user", "content": text})
        self._put(MessageView(text, asked=True))
        self._reply = self._put(MessageView("", asked=False))
        self._show(ready=False, replying=True)
        self._timer.start()
        self.wanted_reply.emit()

    def start_anew(self) -> None:
        """Forgets the conversation."""
        self.messages = []
        for view in self._views:
            view.deleteLater()
        self._views, self._reply, self._pending = [], None, []
        self.problem.hide()
        self.used.setText(f"A conversation has room for {self._context} tokens")

    # --- inside -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Draws what has come since the last time."""
        pending, self._pending = self._pending, []
        if not pending or self._reply is None:
            return
        bar = self._area.verticalScrollBar()
        follows = bar.value() >= bar.maximum() - 40
        self._reply.append("".join(each.text for each in pending), "".join(each.reasoning for each in pending))
        self._tell_context(pending[-1].timings)
        if follows:
            self._scroll_down()

    def _finish(self, last: Chunk) -> None:
        reply, self._reply = self._reply, None
        assert reply is not None
        timings = last.timings
        ends = {"cancelled": "stopped", "length": "ended at its longest"}
        told = [ends[last.finish_reason]] if last.finish_reason in ends else []
        told += [
            f"{timings.generated_tokens} tokens",
            f"{timings.generated_per_second:.0f} tokens/s",
            f"first token after {timings.time_to_first_token:.2f} s",
        ]
        reply.annotate("  ·  ".join(told))
        # What was stopped is part of the conversation too.
        self.messages.append({"role": "assistant", "content": reply.text})
        self._show(ready=True)
        self._scroll_down()
        self.field.setFocus()

    def _tell_context(self, timings: Timings) -> None:
        used = timings.prompt_tokens + timings.generated_tokens
        self.used.setText(f"{used} of {self._context} tokens of the conversation are used")

    def _put(self, view: MessageView) -> MessageView:
        self._views.append(view)
        self._column.insertWidget(self._column.count() - 1, view)
        self._scroll_down()
        return view

    def _scroll_down(self) -> None:
        # After the layout has made room for what is new.
        QTimer.singleShot(0, lambda: self._area.verticalScrollBar().setValue(self._area.verticalScrollBar().maximum()))

    def _show(self, *, ready: bool, replying: bool = False) -> None:
        if not replying:
            self._timer.stop()
        self.send.setEnabled(ready)
        self.send.setVisible(not replying)
        self.stop.setVisible(replying)
        self.clear.setEnabled(ready)
        self.field.setEnabled(ready or replying)

    def _lay_out(self) -> None:
        head = QVBoxLayout()
        head.setSpacing(2)
        head.addWidget(self.title)
        head.addWidget(self.used)
        top = QHBoxLayout()
        top.addLayout(head, 1)
        top.addWidget(self.clear)
        self._area = QScrollArea()
        self._area.setObjectName("transcript")
        self._area.setWidgetResizable(True)
        self._area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        inner = QWidget()
        self._column = QVBoxLayout(inner)
        self._column.setContentsMargins(0, 6, 6, 6)
        self._column.setSpacing(12)
        self._column.addStretch()
        self._area.setWidget(inner)
        bottom = QHBoxLayout()
        bottom.addWidget(self.field, 1)
        for each in (self.send, self.stop):
            bottom.addWidget(each, 0, Qt.AlignmentFlag.AlignBottom)
        self._layout = QVBoxLayout(self)
        self._layout.setContentsMargins(20, 16, 20, 16)
        self._layout.setSpacing(12)
        self._layout.addLayout(top)
        self._layout.addWidget(self._area, 1)
        self._layout.addWidget(self.problem)
        self._layout.addLayout(bottom)

    def put_below(self, widget: QWidget) -> None:
        """Puts `widget` between the conversation and the field."""
        self._layout.insertWidget(self._layout.count() - 2, widget)
