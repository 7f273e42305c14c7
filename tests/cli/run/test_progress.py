"""What a run shows on a terminal: the bars, on standard error only."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgemoe.cli.main import main
from edgemoe.cli.render import columns, duration, milliseconds
from edgemoe.cli.run import progress
from edgemoe.cli.run.progress import RunTally
from tests.support import ROOT
from tests.support.fake_engine import FakeEngine, FakeFactory, FakeStats

RUN = """
import sys, time
from tests.support.fake_engine import FakeEngine, FakeFactory
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
            [sys.executable, "-c", RUN], cwd=ROOT, stdin=subprocess.PIPE, stdout=file, stderr=terminal,
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
    assert "tokens/s, hit rate 75.0%" in shown
    assert "/?" in shown
    assert "line-1: prompt 13 tokens at 10.0/s" in shown
    assert re.search(r"edgemoe: 2 requests, 0 failed, in \d", shown)


def test_a_tally_tells_what_the_engine_did_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 104.0, 104.0])
    monkeypatch.setattr("edgemoe.cli.run.progress.time.monotonic", lambda: next(clock))
    engine = FakeEngine(
        stats=FakeStats(tokens_prompt=7, tokens_generated=1, hits=100, misses=100, bytes_loaded=1 << 30)
    )
    tally = RunTally(engine)
    tally.add(failed=False)
    tally.add(failed=True)
    assert tally.now() == ""
    engine.stats = FakeStats(
        tokens_prompt=27, tokens_generated=11, hits=175, misses=125, bytes_loaded=(1 << 30) + 15 * 1024,
        prefix_tokens=6, batch=16, batch_reason="32 made no more", speculation="ngram, while it pays",
    )  # fmt: skip
    assert tally.now() == "2.5 tokens/s, hit rate 75.0%"
    assert tally.summary(skipped=3) == [
        "2 requests, 1 failed, in 4.00 s; 3 more had a result already",
        "prompt 20 tokens at 5.0/s, generated 10 tokens at 2.5/s, hit rate 75.0%, 1.5 KiB moved for a generated token",
        "batch 16: 32 made no more; 6 prompt tokens shared with another request",
        "speculation by ngram, while it pays: nothing drafted",
    ]


def test_a_tally_tells_of_each_cycle_and_with_verbose_of_each_step() -> None:
    engine = FakeEngine(stats=FakeStats(tokens_generated=9, steps=100, cycles=50, drafted=1000, link_wait_seconds=9.0))
    tally = RunTally(engine)
    engine.stats = FakeStats(
        tokens_generated=39, hits=9, misses=3, steps=120, link_wait_seconds=9.5, bytes_demanded=30 << 20,
        bytes_prefetched_used=10 << 20, bytes_prefetched_late=20 << 10, bytes_prefetched_wasted=5,
        speculation="self, always", cycles=60, drafted=1045, accepted=16, draft_seconds=0.02, verify_seconds=1.0,
    )  # fmt: skip
    cycles = (
        "10 cycles of speculation, each 4.50 tokens drafted, 1.60 accepted, 2.60 generated, "
        "draft 2.00 ms, verify 100.0 ms"
    )
    assert tally.summary()[3:] == [cycles]
    assert tally.summary(verbose=True)[3:] == [
        "20 steps, each 1.5 MiB demanded, 512.0 KiB prefetched in time, 1.0 KiB late, 0 B in vain, link wait 25.0 ms",
        cycles,
    ]


def test_a_tally_of_failures_has_no_speed() -> None:
    tally = RunTally(FakeEngine())
    tally.add(failed=True)
    assert tally.summary() == ["1 request, 1 failed, in 0.00 s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (12.34, "12.3 s"), (65.4, "1 min 05 s"), (3600, "1 h 00 min"), (7322, "2 h 02 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.00 ms"), (0.00042, "0.42 ms"), (0.0123, "12.3 ms")])
def test_short_durations(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_columns() -> None:
    assert columns([]) == ""
    assert columns([("a", "bb", "c"), ("aaa", "b", "")]) == "a    bb  c\naaa  b"


def test_a_file_of_notes_gets_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_NOTE", 0.05)
    monkeypatch.setattr(progress, "NEXT_NOTES", 0.05)
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    engine = FakeEngine(before_word=lambda word: time.sleep(0.1))
    assert main(["run", str(tmp_path / "p.txt"), "-m", "x", "-o", str(tmp_path / "o")], engine=FakeFactory(engine)) == 0
    *lines, summary, _, _, _ = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("edgemoe: 0 of 2 answered")
    assert len(lines) >= 3
    assert summary.startswith("edgemoe: 2 requests, 0 failed")
    assert all(line.isprintable() for line in lines)


def test_such_a_line_tells_what_failed_and_how_fast_it_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_NOTE", 0.01)
    monkeypatch.setattr(progress, "NEXT_NOTES", 60.0)
    engine = FakeEngine(stats=FakeStats())
    tally = RunTally(engine)
    engine.stats = FakeStats(tokens_generated=50)
    tally.add(failed=True)
    with progress.display(tally, None, verbose=False, shares_terminal=False):
        deadline = time.monotonic() + 5
        said = ""
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert re.fullmatch(r"edgemoe: 1 answered, 1 failed, [\d.]+ tokens/s, hit rate 0\.0%\n", said)
