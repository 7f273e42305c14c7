"""What is said about a long job where standard error is no terminal; test_terminal.py shows the bar."""

from __future__ import annotations

import pytest

from edgemoe.cli.progress_bar import progress_bar
from edgemoe.cli.timed_notes import FIRST_NOTE, NEXT_NOTES
from edgemoe.results import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("edgemoe.cli.timed_notes.time.monotonic", lambda: now[0])
    return now


def test_a_long_job_says_every_now_and_then_how_far_it_is(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar() as show:
        for second in range(60):
            clock[0] = 100.0 + second
            show(Progress("experts", second << 20, 60 << 20))
    told = [f"edgemoe: experts: {second}.0 MiB of 60.0 MiB" for second in range(int(FIRST_NOTE), 60, int(NEXT_NOTES))]
    assert capsys.readouterr().err.splitlines() == told


def test_a_stage_without_a_total_is_named(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as show:
        clock[0] += FIRST_NOTE
        show(Progress("reading the checkpoint", 0, 0))
    assert capsys.readouterr().err == "edgemoe: reading the checkpoint\n"


def test_a_short_job_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as show:
        show(Progress("experts", 1, 2))
    assert capsys.readouterr().err == ""
