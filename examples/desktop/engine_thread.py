"""The thread that loads a model, answers and unloads. The window talks to the engine through it alone."""

from __future__ import annotations

import threading
from typing import Any

from PySide6.QtCore import Signal

import edgemoe
from edgemoe import EdgeMoEError, Progress, Sampling, Stats, Stream
from examples.desktop.job_thread import JobThread

Messages = list[dict[str, Any]]


class EngineThread(JobThread):
    """Every method returns at once; what comes of it is told by a signal."""

    loading = Signal(str, object, object)
    """A stage of loading, and its bytes: those done, and all. Sizes need more bits than Qt's int has."""
    loaded = Signal(object)
    """The plan of the loaded model."""
    unloaded = Signal()
    """The memory is free again, or loading was stopped."""
    replied = Signal(object)
    """A chunk of the reply; the last one has a finish reason."""
    refused = Signal(str)
    """There is no reply, or no more of it; the sentence says why. The engine stays usable."""

    def __init__(self) -> None:
        super().__init__()
        self._engine: edgemoe.Engine | None = None
        self._stream: Stream | None = None
        self._stop = threading.Event()

    # --- called by the window ---------------------------------------------------------------------

    def load(self, model: str | None, settings: dict[str, Any]) -> None:
        """Loads `model`, in place of the one that is loaded."""
        self._stop = stop = threading.Event()
        self.submit(lambda: self._load(model, settings, stop))

    def ask(self, messages: Messages, sampling: Sampling) -> None:
        """Replies to a conversation, or to its last message alone where the model has no chat template."""
        self._stop = stop = threading.Event()
        self.submit(lambda: self._ask(messages, sampling, stop))

    def stop(self) -> None:
        """Stops what was begun last: loading, or a reply, which then ends with the reason "cancelled"."""
        self._stop.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def unload(self) -> None:
        """Gives the memory back."""
        self.submit(self._unload)

    def stats(self) -> Stats | None:
        """What the engine has counted since it was loaded; None without one."""
        engine = self._engine
        try:
            return None if engine is None else engine.stats
        except EdgeMoEError:
            return None  # closed meanwhile

    def prompt_progress(self) -> tuple[int, int] | None:
        """Tokens of the prompt that are computed, and all; None where no prompt is."""
        stream = self._stream
        if stream is None or stream.prompt_done >= stream.prompt_tokens:
            return None
        return stream.prompt_done, stream.prompt_tokens

    def end(self) -> None:
        self.stop()
        self.unload()
        super().end()

    # --- done by the thread -----------------------------------------------------------------------

    def _load(self, model: str | None, settings: dict[str, Any], stop: threading.Event) -> None:
        self._unload()
        if stop.is_set():
            return
        try:
            self._engine = edgemoe.Engine.load(model, on_progress=self._tell, stop=stop, **settings)
        except Exception as error:
            self.unloaded.emit()
            if stop.is_set() and isinstance(error, EdgeMoEError):
                return
            raise
        self.loaded.emit(self._engine.plan)

    def _tell(self, progress: Progress) -> None:
        self.loading.emit(progress.stage, progress.done, progress.total)

    def _ask(self, messages: Messages, sampling: Sampling, stop: threading.Event) -> None:
        engine = self._engine
        assert engine is not None, "the window asks only while a model is loaded"
        try:
            prompt = messages if engine.has_chat_template else messages[-1]["content"]
            with engine.stream(prompt, sampling) as stream:
                self._stream = stream
                if stop.is_set():
                    stream.cancel()
                for chunk in stream:
                    self.replied.emit(chunk)
        except EdgeMoEError as error:
            self.refused.emit(str(error))
        finally:
            self._stream = None

    def _unload(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        self.unloaded.emit()
