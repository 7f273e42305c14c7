"""The window: which view hears of which thread, and what becomes of both when it is closed."""

from __future__ import annotations

import time
from typing import Any

from PySide6.QtCore import QTimer
from PySide6.QtGui import QCloseEvent
from PySide6.QtWidgets import QHBoxLayout, QMainWindow, QWidget

from edgemoe import Plan, Sampling
from examples.desktop.chat_view import ChatView
from examples.desktop.engine_thread import EngineThread
from examples.desktop.figures_view import FiguresView
from examples.desktop.models_thread import ModelsThread
from examples.desktop.models_view import ModelsView

POLL_MS = 250
"""How often the engine's totals are read."""


class Window(QMainWindow):
    """Models and plan on the left, the conversation and live figures on the right."""

    def __init__(self, sampling: Sampling | None = None) -> None:
        super().__init__()
        self.setWindowTitle("edgemoe")
        self.setMinimumSize(1020, 640)
        self.resize(1180, 780)
        self._sampling = sampling or Sampling()
        self._closing = False
        self.engine, self.search = EngineThread(), ModelsThread()
        self.models, self.chat, self.figures = ModelsView(), ChatView(), FiguresView()
        self.chat.put_below(self.figures)
        middle = QWidget()
        row = QHBoxLayout(middle)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(0)
        row.addWidget(self.models)
        row.addWidget(self.chat, 1)
        self.setCentralWidget(middle)
        self._poll = QTimer(self, interval=POLL_MS)
        self._poll.timeout.connect(self._read)
        self._connect_models()
        self._connect_engine()
        self.search.plan(self.models.model, self.models.settings)
        self.search.find([])

    def _connect_models(self) -> None:
        self.models.wanted_plan.connect(self.search.plan)
        self.models.wanted_folder.connect(self._find)
        self.search.found.connect(self.models.add)
        self.search.searched.connect(self.models.searching.hide)
        self.search.planned.connect(self.models.plan.show_plan)
        self.search.unplanned.connect(self.models.plan.refuse)
        self.search.failed.connect(self.models.plan.refuse)

    def _connect_engine(self) -> None:
        self.models.wanted_load.connect(self._load)
        self.models.wanted_stop.connect(self.engine.stop)
        self.models.wanted_unload.connect(self._unload)
        self.engine.loading.connect(self.models.show_loading)
        self.engine.loaded.connect(self._loaded)
        self.engine.unloaded.connect(self._unloaded)
        self.engine.failed.connect(self._failed)
        self.chat.wanted_reply.connect(lambda: self.engine.ask(list(self.chat.messages), self._sampling))
        self.chat.wanted_stop.connect(self.engine.stop)
        self.engine.replied.connect(self.chat.add)
        self.engine.refused.connect(self.chat.refuse)

    def closeEvent(self, event: QCloseEvent) -> None:
        """Disappears at once, and closes when both threads have ended: what they do is stopped, not waited for."""
        running = [thread for thread in (self.engine, self.search) if thread.isRunning()]
        if not running:
            event.accept()
            return
        event.ignore()
        self.hide()
        if not self._closing:
            self._closing = True
            self._poll.stop()
            for thread in running:
                thread.finished.connect(self.close)
                thread.end()

    def _find(self, folder: str) -> None:
        self.models.searching.show()
        self.search.find([folder])

    def _load(self, model: str | None, settings: dict[str, Any]) -> None:
        self.models.show_loading()
        self.engine.load(model, settings)

    def _loaded(self, plan: Plan) -> None:
        self.models.show_loaded(plan)
        self.chat.show_open(plan.model, plan.context)
        self.figures.clear()
        self._poll.start()

    def _unload(self) -> None:
        self.engine.stop()
        self.engine.unload()
        self.models.show_busy("Unloading …")

    def _unloaded(self) -> None:
        self._poll.stop()
        self.figures.clear()
        self.models.show_idle()
        self.chat.show_closed()

    def _failed(self, sentence: str) -> None:
        """Shows it where it belongs: a reply that was begun has no other end."""
        (self.chat.refuse if self.chat.replying else self.models.plan.refuse)(sentence)

    def _read(self) -> None:
        stats = self.engine.stats()
        if stats is not None:
            self.figures.add(stats, time.monotonic())
        prompt = self.engine.prompt_progress()
        if prompt is not None:
            self.chat.show_reading(*prompt)
