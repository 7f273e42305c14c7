"""What a run shows on a terminal: the bars, on standard error only."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import timings

from edgemoe.cli.progress import Tally
from edgemoe.cli.render import columns, duration

HERE = Path(__file__).parent

RUN = """
import sys, time
from fake_engine import FakeEngine, FakeFactory
from edgemoe.cli.main import main
engine = FakeEngine(before_word=lambda word: time.sleep(0.1))
sys.exit(main(["run", "-", "-m", "x", "--raw", "-v"], engine=FakeFactory(engine)))
"""


def read_all(terminal: int) -> str:
    """Everything that was shown until the last program left the terminal."""
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says so
            return shown.decode()
        if not piece:
            return shown.decode()
        shown += piece


def test_a_run_on_a_terminal_shows_how_it_is_getting_on(tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    out = tmp_path / "out"
    with out.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN], cwd=HERE, stdin=subprocess.PIPE, stdout=file, stderr=terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
        )  # fmt: skip
    os.close(terminal)
    assert process.stdin is not None
    process.stdin.write(b"[bold] prompt\ntwo\n")
    process.stdin.close()
    shown = read_all(screen)
    os.close(screen)
    assert process.wait(timeout=20) == 0
    assert out.read_text().count("\n") == 2
    assert "tokens/s, hit rate 75.0%, 1.0 KiB a token" in shown
    assert "line-1: prompt 13 tokens at 10.0/s" in shown
    assert "edgemoe: 2 requests, 0 failed, in 0." in shown


def test_a_tally_adds_up() -> None:
    tally = Tally()
    tally.add(timings(3, 5), failed=False)
    tally.add(None, failed=True)
    tally.add(timings(10, 9), failed=False)
    assert (tally.finished, tally.failed) == (3, 1)
    assert tally.timings is not None
    assert (tally.timings.prompt_tokens, tally.timings.generated_tokens) == (13, 14)
    assert (tally.timings.hits, tally.timings.misses, tally.timings.bytes_loaded) == (42, 14, 27 * 1024)
    # The first token of each request belongs to its prompt: 12 tokens in 3 seconds.
    assert tally.generated_per_second == pytest.approx(4.0)
    assert tally.summary().endswith(
        "; prompt 13 tokens at 10.0/s, generated 14 tokens at 4.0/s, hit rate 75.0%, 1.0 KiB a token"
    )


def test_a_tally_of_failures_has_no_speed() -> None:
    tally = Tally()
    tally.add(None, failed=True)
    assert tally.generated_per_second == 0
    assert tally.summary() == "1 request, 1 failed, in 0.00 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (12.34, "12.3 s"), (65.4, "1 min 05 s"), (3600, "1 h 00 min"), (7322, "2 h 02 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_columns() -> None:
    assert columns([]) == ""
    assert columns([("a", "bb", "c"), ("aaa", "b", "")]) == "a    bb  c\naaa  b"
