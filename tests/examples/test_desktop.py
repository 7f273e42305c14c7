"""The desktop program, driven without a screen as a user drives it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
_PROBE = "from PySide6.QtWidgets import QApplication; QApplication([])"


def _missing() -> str:
    """Why Qt cannot start here; a process that tries ends without an exception where a library is missing."""
    tried = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"Qt cannot start: {tried.stderr.strip()[-300:]}"


if why := _missing():
    pytest.skip(why, allow_module_level=True)

from PySide6.QtCore import Qt
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication

from edgemoe import Engine, FoundModel, Sampling, Stats
from examples.desktop.figures_view import FiguresView
from examples.desktop.message_view import MessageView
from examples.desktop.style import STYLE
from examples.desktop.window import Window

OTHERS: set[threading.Thread] = set()
"""Threads that were there before the first window."""
LONG = Sampling(temperature=0, ignore_eos=True)
"""Replies as long as the context is."""
STORY = "Tell me a story about an owl named Hugo and a lamp."


@pytest.fixture(scope="module")
def application() -> QApplication:
    made = QApplication.instance() or QApplication([])
    assert isinstance(made, QApplication)
    made.setStyleSheet(STYLE)
    return made


def until(true: Callable[[], Any], seconds: float = 90) -> None:
    """Lets the program run until something is so."""
    late = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < late, "waited in vain"
        QApplication.processEvents()
        time.sleep(0.005)


def ended(window: Window) -> bool:
    return not window.engine.isRunning() and not window.search.isRunning()


Opened = Callable[..., Window]


@pytest.fixture
def opened(application: QApplication) -> Iterator[Opened]:
    """Opens windows; at the end each is closed, and its threads have ended."""
    windows: list[Window] = []
    OTHERS.update(threading.enumerate())

    def open_window(sampling: Sampling | None = None) -> Window:
        windows.append(Window(sampling))
        windows[-1].show()
        return windows[-1]

    yield open_window
    for window in windows:
        window.close()
        until(partial(ended, window))
        QApplication.processEvents()
        assert not window.isVisible()
        assert window.close(), "a window whose threads have ended closes at once"
        window.deleteLater()
    QApplication.processEvents()
    # What a stopped load has begun is given back soon after.
    until(lambda: not engine_threads())


def engine_threads() -> list[str]:
    """The threads of engines, without those that other tests of this process still have."""
    return [each.name for each in set(threading.enumerate()) - OTHERS if each.name.startswith("edgemoe")]


def load(window: Window, cache: str = "50%") -> None:
    window.models.cache.setCurrentText(cache)
    QTest.mouseClick(window.models.load, Qt.MouseButton.LeftButton)
    until(lambda: window.chat.send.isEnabled())


def ask(window: Window, text: str) -> None:
    QTest.keyClicks(window.chat.field, text)
    QTest.keyClick(window.chat.field, Qt.Key.Key_Return)


def replies(window: Window) -> list[str]:
    return [each["content"] for each in window.chat.messages if each["role"] == "assistant"]


@pytest.mark.slow
def test_a_conversation(opened: Opened) -> None:
    window = opened(Sampling(temperature=0))
    load(window)
    assert window.chat.title.text() == "edgemoe-demo"
    assert not window.models.picker.isEnabled()
    ask(window, "What is 48 + 31?")
    until(lambda: replies(window))
    assert replies(window) == ["48 + 31 = 79"]
    until(lambda: window.figures.hits.figure.text().endswith("%"))
    assert window.figures.hits.of.text() == "112 of 224 experts fit"
    assert "tokens of the conversation are used" in window.chat.used.text()
    ask(window, "What is the capital of Norway?")
    until(lambda: len(replies(window)) == 2)
    assert "Oslo" in replies(window)[1]
    window.chat.clear.click()
    assert window.chat.messages == []


@pytest.mark.slow
def test_a_reply_is_stopped_and_the_model_unloaded_and_loaded_again(opened: Opened) -> None:
    window = opened(LONG)
    load(window)
    ask(window, STORY)
    until(lambda: window.chat.stop.isVisible() and window.figures.speed.curve.values)
    # The first figure of speed may come with the first word.
    until(lambda: window.engine.stats().tokens_generated > 64)  # type: ignore[union-attr]
    window.chat.stop.click()
    until(lambda: replies(window))
    assert replies(window)[0].startswith("Once upon a time")
    window.models.unload.click()
    until(lambda: window.models.load.isVisible())
    assert window.engine.stats() is None
    assert window.figures.speed.figure.text() == "–"
    assert not window.chat.send.isEnabled()
    assert engine_threads() == []
    load(window, "auto")
    assert "224 slots" in " ".join(window.models.plan.texts)


@pytest.mark.slow
def test_a_model_is_unloaded_in_the_middle_of_a_reply(opened: Opened) -> None:
    window = opened(LONG)
    load(window)
    ask(window, STORY)
    until(lambda: window.engine.stats().tokens_generated > 3)  # type: ignore[union-attr]
    window.models.unload.click()
    until(lambda: window.models.load.isVisible())
    assert replies(window)


@pytest.mark.slow
def test_the_window_closes_in_the_middle_of_a_reply(opened: Opened) -> None:
    window = opened(LONG)
    load(window)
    ask(window, STORY)
    until(lambda: window.engine.stats().tokens_generated > 3)  # type: ignore[union-attr]


def test_the_window_closes_while_a_model_is_loaded(opened: Opened) -> None:
    window = opened()
    window.models.load.click()
    window.close()
    assert not window.isVisible()


def test_loading_is_stopped(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    window = opened()
    begun, load = threading.Event(), Engine.load

    def slow(*given: Any, stop: threading.Event, **settings: Any) -> Engine:
        begun.set()
        assert stop.wait(60)
        return load(*given, stop=stop, **settings)

    monkeypatch.setattr(Engine, "load", slow)
    window.models.load.click()
    assert window.models.stop.isVisible()
    until(begun.is_set)
    window.models.stop.click()
    until(lambda: window.models.load.isVisible())
    assert window.models.plan.problem.isHidden()
    assert window.engine.stats() is None


def test_no_engine_runs_in_the_windows_thread(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    window = opened()
    threads: dict[str, threading.Thread] = {}

    def noted(name: str) -> Callable[..., Any]:
        original = getattr(Engine, name)

        def call(*given: Any, **settings: Any) -> Any:
            threads[name] = threading.current_thread()
            return original(*given, **settings)

        return call

    names = ("load", "plan_for", "stream", "close")
    for name in names:
        monkeypatch.setattr(Engine, name, noted(name))
    window.models.context.setValue(512)
    load(window)
    ask(window, "What is 48 + 31?")
    until(lambda: replies(window))
    window.models.unload.click()
    until(lambda: len(threads) == len(names))
    assert threading.main_thread() not in threads.values()
    until(lambda: window.models.load.isVisible())


def test_what_does_not_fit_is_told_with_what_mends_it(opened: Opened) -> None:
    window = opened()
    until(lambda: window.models.plan.texts)
    assert "edgemoe-demo" in window.models.plan.texts
    window.models.context.setValue(1 << 20)
    until(window.models.plan.problem.isVisible)
    assert "context" in window.models.plan.problem.text()
    window.models.load.click()
    until(lambda: window.models.load.isVisible())
    window.models.context.setValue(512)
    until(lambda: "of 512 tokens" in "".join(window.models.plan.texts))
    assert window.models.plan.problem.isHidden()


def test_a_folder_that_is_no_model_is_told(opened: Opened, tmp_path: Any) -> None:
    window = opened()
    window.models.choose(str(tmp_path))
    assert window.models.model == str(tmp_path)
    until(window.models.plan.problem.isVisible)
    assert str(tmp_path) in window.models.plan.problem.text()


@pytest.mark.slow
def test_a_question_that_is_too_long_goes_back_into_the_field(opened: Opened) -> None:
    window = opened()
    window.models.context.setValue(64)
    load(window)
    long = "owl " * 200
    window.chat.field.setPlainText(long)
    window.chat.send.click()
    until(window.chat.problem.isVisible)
    assert "64" in window.chat.problem.text()
    assert window.chat.field.toPlainText() == long.strip()
    assert window.chat.messages == []
    window.chat.field.clear()
    ask(window, "What is 48 + 31?")
    until(lambda: replies(window))


def test_faults_are_told_too(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    window = opened()

    def fail(*given: Any, **settings: Any) -> Any:
        raise RuntimeError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "load", fail)
        window.models.load.click()
        until(window.models.plan.problem.isVisible)
        assert window.models.plan.problem.text() == "unexpected RuntimeError: a fault"
        assert window.models.load.isVisible()
    load(window)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "stream", fail)
        ask(window, "Hello")
        until(window.chat.problem.isVisible)
        assert window.chat.problem.text() == "unexpected RuntimeError: a fault"
        assert window.chat.field.toPlainText() == "Hello"
        assert window.chat.send.isVisible()


def test_models_that_were_found(opened: Opened) -> None:
    window = opened()
    window.models.add(FoundModel("org/one", 3 << 30, "mixtral", ("bf16",), 0.5))
    window.models.add(FoundModel("org/two", 3 << 30, None, (), None, "is damaged"))
    window.models.choose("org/one")
    assert window.models.model == "org/one"
    picker = window.models.picker
    refused = picker.findData("org/two")
    assert "is damaged" in picker.itemText(refused)
    assert not picker.model().flags(picker.model().index(refused, 0)) & Qt.ItemFlag.ItemIsEnabled
    window.models.choose("org/one")
    assert picker.findText("one", Qt.MatchFlag.MatchStartsWith) == picker.currentIndex()


def test_a_reply_is_never_read_as_markup(application: QApplication) -> None:
    view = MessageView("", asked=False)
    view.append("<b>bold</b>", "<i>why</i>")
    view.append(" & more")
    assert (view.text, view.reasoning) == ("<b>bold</b> & more", "<i>why</i>")
    labels = [each.text() for each in (view._text, view._reasoning)]
    assert labels == [view.text, view.reasoning]
    assert {each.textFormat() for each in (view._text, view._reasoning)} == {Qt.TextFormat.PlainText}


def test_figures_are_those_between_two_readings(application: QApplication) -> None:
    view = FiguresView()
    before = Stats(slots=50, experts=100)
    view.add(before, 0.0)
    assert view.hits.of.text() == "50 of 100 experts fit"
    view.add(replace(before, hits=90, misses=10, steps=4, tokens_generated=30, drafted=8, accepted=6), 0.5)
    assert [tile.figure.text() for tile in view.tiles] == ["60", "90%", "0 MiB/s", "75%"]
    view.clear()
    assert [tile.figure.text() for tile in view.tiles] == ["–"] * 4
