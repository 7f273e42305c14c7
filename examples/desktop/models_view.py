"""Which model, with which settings, and the plan for it; loading and unloading."""

from __future__ import annotations

import os
from typing import Any

from PySide6.QtCore import Qt, QTimer, Signal
from PySide6.QtWidgets import (
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QProgressBar,
    QScrollArea,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from edgemoe import FoundModel, Plan
from examples.desktop.plan_view import PlanView
from examples.desktop.widgets import button, label

SHIPPED = "Small model that ships with edgemoe"
MAX_CONTEXT = 1 << 24
PLAN_DELAY_MS = 250
"""After the last change of a setting."""
CACHES = ("auto", "75%", "50%", "25%")


class ModelsView(QWidget):
    """The left side of the window. It knows no engine: it tells what is wanted, and shows what it is told."""

    wanted_plan = Signal(object, object)
    """A model, None for the one that ships with edgemoe, and settings of `Engine.load`."""
    wanted_load = Signal(object, object)
    wanted_unload = Signal()
    wanted_stop = Signal()
    wanted_folder = Signal(str)
    """A folder to look for models in."""

    def __init__(self) -> None:
        super().__init__()
        self.setObjectName("sidebar")
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self.setFixedWidth(340)
        self.picker = QComboBox()
        self.picker.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.picker.setMinimumContentsLength(10)
        self.picker.addItem(SHIPPED, None)
        self.folder, self.file = button("Folder …"), button("GGUF file …")
        self.searching = label("Looking for models on this machine …", "hint")
        self.cache = QComboBox()
        self.cache.setEditable(True)
        self.cache.addItems(CACHES)
        self.cache.setToolTip("Memory for experts: auto, a size (6GiB), a share of the experts (40%) or slots (96)")
        self.context = QSpinBox()
        self.context.setRange(0, MAX_CONTEXT)
        self.context.setSingleStep(1024)
        self.context.setSpecialValueText("as the model has it")
        self.context.lineEdit().setTextMargins(6, 0, 0, 0)
        self.context.setToolTip("Tokens of a conversation at most")
        self.plan = PlanView()
        self.load, self.unload, self.stop = button("Load", "primary"), button("Unload"), button("Stop loading")
        self.progress = QProgressBar()
        self.progress.setTextVisible(False)
        self.stage = label("", "hint")
        self._timer = QTimer(self, singleShot=True, interval=PLAN_DELAY_MS)
        self._lay_out()
        self._connect()
        self.show_idle()

    @property
    def model(self) -> str | None:
        """The chosen model; None is the one that ships with edgemoe."""
        chosen = self.picker.currentData()
        return None if chosen is None else str(chosen)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings for `Engine.load`, for one conversation at a time."""
        cache = self.cache.currentText().strip() or "auto"
        slots = int(cache) if cache.isdecimal() else cache
        return {"expert_cache": slots, "context": self.context.value() or None, "batch": 1}

    def add(self, found: FoundModel) -> None:
        """Puts a model on the list; one that would not run cannot be chosen, and says why."""
        if self.picker.findData(found.model) >= 0:
            return
        size = f"{found.nbytes / (1 << 30):.1f} GiB"
        self.picker.addItem(f"{os.path.basename(found.model.rstrip('/'))}  ·  {size}", found.model)
        last = self.picker.count() - 1
        self.picker.setItemData(last, found.problem or found.model, Qt.ItemDataRole.ToolTipRole)
        if not found.runs:
            self.picker.setItemText(last, f"{self.picker.itemText(last)}  ·  {found.problem}")
            self.picker.model().item(last).setEnabled(False)  # type: ignore[attr-defined]

    def choose(self, model: str) -> None:
        """Chooses a folder, a GGUF file or a Hugging Face id, whether it was found or not."""
        index = self.picker.findData(model)
        if index < 0:
            self.picker.addItem(os.path.basename(model.rstrip("/")) or model, model)
            index = self.picker.count() - 1
        self.picker.setCurrentIndex(index)

    def show_idle(self) -> None:
        """Nothing is loaded."""
        self._show(settable=True, load=True)

    def show_loading(self, stage: str = "starting", done: int = 0, total: int = 0) -> None:
        """Loading has come this far, in bytes."""
        self._show(stop=True)
        self.progress.setRange(0, 1000 if total else 0)
        self.progress.setValue(1000 * done // total if total else 0)
        told = f", {done / (1 << 20):.0f} of {total / (1 << 20):.0f} MiB" if total else ""
        self.stage.setText(f"Loading {stage}{told}")

    def show_loaded(self, plan: Plan) -> None:
        """`plan` is that of the loaded model."""
        self._show(unload=True)
        self.plan.show_plan(plan)

    def show_busy(self, what: str) -> None:
        """Something is going on that cannot be stopped."""
        self._show()
        self.stage.setText(what)
        self.stage.show()

    def _show(self, *, settable: bool = False, load: bool = False, unload: bool = False, stop: bool = False) -> None:
        for widget in (self.picker, self.folder, self.file, self.cache, self.context):
            widget.setEnabled(settable)
        self.load.setVisible(load)
        self.unload.setVisible(unload)
        for shown in (self.stop, self.progress, self.stage):
            shown.setVisible(stop)

    def _lay_out(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(18, 18, 18, 18)
        layout.setSpacing(7)
        layout.addWidget(label("MODEL", "heading"))
        layout.addWidget(self.picker)
        layout.addLayout(_row(self.folder, self.file))
        layout.addWidget(self.searching)
        layout.addSpacing(8)
        layout.addWidget(label("EXPERT CACHE", "heading"))
        layout.addWidget(self.cache)
        layout.addWidget(label("CONTEXT, TOKENS", "heading"))
        layout.addWidget(self.context)
        layout.addSpacing(8)
        for widget in (self.load, self.unload, self.stage, self.progress, self.stop):
            layout.addWidget(widget)
        layout.addSpacing(8)
        layout.addWidget(label("PLAN", "heading"))
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        inner = QWidget()
        column = QVBoxLayout(inner)
        column.setContentsMargins(0, 0, 6, 0)
        column.addWidget(self.plan)
        column.addStretch()
        area.setWidget(inner)
        layout.addWidget(area, 1)

    def _connect(self) -> None:
        self.picker.currentIndexChanged.connect(self._changed)
        self.cache.currentTextChanged.connect(self._changed)
        self.context.valueChanged.connect(self._changed)
        self._timer.timeout.connect(lambda: self.wanted_plan.emit(self.model, self.settings))
        self.load.clicked.connect(lambda: self.wanted_load.emit(self.model, self.settings))
        self.unload.clicked.connect(self.wanted_unload)
        self.stop.clicked.connect(self.wanted_stop)
        self.folder.clicked.connect(self._pick_folder)
        self.file.clicked.connect(self._pick_file)

    def _changed(self) -> None:
        self.plan.wait()
        self._timer.start()

    def _pick_folder(self) -> None:
        if folder := QFileDialog.getExistingDirectory(self, "A checkpoint, or a folder of checkpoints"):
            if os.path.exists(os.path.join(folder, "config.json")):
                self.choose(folder)
            else:
                self.wanted_folder.emit(folder)

    def _pick_file(self) -> None:
        file, _ = QFileDialog.getOpenFileName(self, "A GGUF file", filter="GGUF files (*.gguf)")
        if file:
            self.choose(file)


def _row(*widgets: QWidget) -> QHBoxLayout:
    row = QHBoxLayout()
    for widget in widgets:
        row.addWidget(widget)
    return row
