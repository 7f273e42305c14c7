"""How requests travel through a run: in which order, how far ahead they are read, and how a run is ended early."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgemoe.cli.main import main
from edgemoe.cli.run import outbox
from edgemoe.cli.run import source as source_module
from edgemoe.cli.run.outbox import Outbox, Outcome
from edgemoe.cli.run.source import Line, Source
from tests.support import ROOT
from tests.support.fake_engine import FakeEngine, FakeFactory, FakeStats
from tests.support.waiting import wait_until


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def write(folder: Path, *prompts: str) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt} if prompt else {}) + "\n" for prompt in prompts))
    return str(path)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def run(prompts: str, out: Path, *flags: str, engine: FakeEngine) -> int:
    return main(["run", prompts, "-o", str(out), "-m", "x", *flags], engine=FakeFactory(engine))


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["line-2", "line-3", "line-4", "line-1"]),
        (["--order", "finish"], ["line-2", "line-3", "line-4", "line-1"]),
        (["--order", "input"], ["line-1", "line-2", "line-3", "line-4"]),
    ],
)
def test_results_are_in_the_order_that_is_asked_for(
    flags: list[str], expected: list[str], tmp_path: Path, out: Path
) -> None:
    prompts = write(tmp_path, "one that goes on for long and longer", "", "b", "c")
    assert run(prompts, out, *flags, engine=FakeEngine()) == 1
    assert ids(out) == expected


def test_results_are_written_when_they_finish(tmp_path: Path, out: Path) -> None:
    seen: list[int] = []
    engine = FakeEngine(stats=FakeStats(batch=1))
    engine.before_word = lambda word: seen.append(len(ids(out))) if word == 0 else None
    run(write(tmp_path, "a", "b", "c"), out, engine=engine)
    assert seen == [0, 1, 2]


def test_an_outbox_delivers_in_order_and_counts_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    delivered: list[str] = []
    box = Outbox(lambda outcome: delivered.append(outcome.custom_id), in_order=True)
    monkeypatch.setattr(outbox, "MAX_HELD", 3)
    monkeypatch.setattr(outbox, "MAX_HELD_NBYTES", 100)

    def put(position: int, nbytes: int) -> None:
        box.put(position, Outcome(str(position), bytes(nbytes), ""))

    put(2, 40)
    put(1, 59)
    assert (delivered, box.is_full) == ([], False)
    put(4, 1)
    assert box.is_full
    put(0, 500)
    assert (delivered, box.is_full) == (["0", "1", "2"], False)
    put(5, 100)
    assert box.is_full
    put(3, 1)
    assert (delivered, box.is_full) == (["0", "1", "2", "3", "4", "5"], False)


# --- how far ahead -------------------------------------------------------------------------------


class Watched:
    """Counts the lines that a run has read ahead of its results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.max_ahead = 0
        self._reading = False
        lines = Source.lines

        def counted(source: Source) -> Iterator[Line]:
            for number, line in enumerate(lines(source), 1):
                if self._reading:
                    written = out.read_bytes().count(b"\n") if out.exists() else 0
                    self.max_ahead = max(self.max_ahead, number - written)
                yield line
            self._reading = True  # the first time, the file is only checked

        monkeypatch.setattr(Source, "lines", counted)


@pytest.mark.parametrize("flags", [[], ["--order", "input"]])
def test_a_long_input_is_read_only_a_little_ahead(
    flags: list[str], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, out)
    prompts = write(tmp_path, *(" ".join("p" * (1 + number % 5)) for number in range(500)))
    assert run(prompts, out, *flags, engine=FakeEngine()) == 0
    assert len(ids(out)) == 500
    # Twice the batch of 2 is in flight; a few that overtook others may be held back.
    assert watched.max_ahead <= 4 + (8 if flags else 1)


def test_one_slow_request_does_not_let_results_pile_up(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_HELD", 10)
    watched = Watched(monkeypatch, out)
    prompts = write(tmp_path, " ".join(["slow"] * 400), *("p" for _ in range(100)))
    assert run(prompts, out, "--order", "input", engine=FakeEngine()) == 0
    assert ids(out) == [f"line-{number}" for number in range(1, 102)]
    assert watched.max_ahead <= 10 + 4 + 1


def test_bad_lines_do_not_pile_up(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, out)
    assert run(write(tmp_path, *([""] * 300)), out, engine=FakeEngine()) == 1
    assert len(ids(out)) == 300
    assert watched.max_ahead == 1


TALK = """
import sys
from tests.support.fake_engine import FakeEngine, FakeFactory
from edgemoe.cli.main import main
sys.exit(main(["run", "-", "-m", "x", "--raw"], engine=FakeFactory(FakeEngine())))
"""


def test_a_request_is_answered_before_the_next_one_is_there() -> None:
    """Who writes requests into a pipe may wait for each result."""
    process = subprocess.Popen(
        [sys.executable, "-c", TALK], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for number in (1, 2, 3):
        process.stdin.write(b"Hello\n" * number)
        process.stdin.flush()
        for _ in range(number):
            assert b"You said Hello" in process.stdout.readline()
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    process.stdout.close()


# --- Ctrl-C --------------------------------------------------------------------------------------


def interrupted(engine: FakeEngine, *calls: int, number: int = signal.SIGINT) -> FakeEngine:
    """The engine, which is interrupted before those of its words."""
    words = itertools.count()

    def interrupt(word: int) -> None:
        if next(words) in calls:
            signal.raise_signal(number)
            deadline = time.monotonic() + 5
            while not engine.cancelled_waiting:  # it comes from another thread
                assert time.monotonic() < deadline
                time.sleep(0.001)

    engine.before_word = interrupt
    return engine


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_finishes_what_is_in_flight(
    number: int, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = interrupted(FakeEngine(), 2, number=number)
    before = signal.getsignal(number)
    assert run(write(tmp_path, "a", "b", "c", "d", "e", "f"), out, engine=engine) == 130
    assert ids(out) == ["line-1", "line-2"]
    assert engine.prompts == ["a", "b"]
    first, second, third, *_ = capsys.readouterr().err.splitlines()
    assert first == "edgemoe: finishing 2 in flight; press Ctrl-C again to stop at once"
    assert second == f"edgemoe: interrupted; {out} keeps what was finished; go on with --resume"
    assert third.startswith("edgemoe: 2 requests, 0 failed")
    assert engine.closed
    assert signal.getsignal(number) is before


def interrupted_twice(engine: FakeEngine, word: int) -> FakeEngine:
    """`engine`, with Ctrl-C before the word `word` of all and before the one after it, each carried out by then."""
    words = itertools.count()

    def interrupt(number: int) -> None:
        before = next(words)
        if before in (word, word + 1):
            signal.raise_signal(signal.SIGINT)
            wait_until(lambda: engine.cancelled if before > word else engine.cancelled_waiting)

    engine.before_word = interrupt
    return engine


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = interrupted_twice(FakeEngine(replies={"b": "short"}), 2)
    assert run(write(tmp_path, "a", "b", "c", "d", "e", "f"), out, engine=engine) == 130
    assert ids(out) == ["line-2"]
    assert engine.closed
    assert "interrupted" in capsys.readouterr().err
    assert run(write(tmp_path, "a", "b", "c", "d", "e", "f"), out, "--resume", engine=FakeEngine()) == 0
    assert sorted(ids(out)) == [f"line-{number}" for number in range(1, 7)]


def test_a_request_with_a_choice_that_was_broken_off_leaves_no_record(tmp_path: Path, out: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "n": 3}\n')
    assert run(str(tmp_path / "p.jsonl"), out, engine=interrupted(FakeEngine(), 1)) == 130
    assert ids(out) == []


def test_a_result_that_waits_for_one_that_was_broken_off_is_not_written(tmp_path: Path, out: Path) -> None:
    """The order of the input holds in a file that is resumed, too."""
    prompts = write(tmp_path, "a b c d e f", "b", "c", "d", "e")
    engine = interrupted_twice(FakeEngine(), 5)
    assert run(prompts, out, "--order", "input", engine=engine) == 130
    assert ids(out) == []
    assert run(prompts, out, "--order", "input", "--resume", engine=FakeEngine()) == 0
    assert ids(out) == [f"line-{number}" for number in range(1, 6)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_waiting_for_input(number: int, out: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TALK], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    assert b"You said Hello" in process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (130, b"")
    assert b"edgemoe: interrupted; standard output keeps what was finished\nedgemoe: 1 request, 0 failed" in stderr


def test_a_run_that_ignores_ctrl_c_goes_on_ignoring_it(tmp_path: Path, out: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = FakeEngine(before_word=lambda word: os.kill(os.getpid(), signal.SIGINT))
        assert run(write(tmp_path, "a", "b"), out, engine=engine) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ids(out)) == 2


@pytest.mark.parametrize("flags", [[], ["--order", "input"]])
def test_an_interrupted_run_that_wrote_everything_is_a_run_like_any_other(
    flags: list[str], tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = interrupted(FakeEngine(stats=FakeStats(batch=4)), 3)
    assert run(write(tmp_path, "a", "b", "c d e"), out, *flags, engine=engine) == 0
    assert sorted(ids(out)) == ["line-1", "line-2", "line-3"]
    said = capsys.readouterr().err
    assert "interrupted" not in said
    assert "edgemoe: 3 requests, 0 failed" in said


def test_what_was_read_before_the_input_fails_is_answered(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source_module, "MAX_LINE", 1000)
    prompts = write(tmp_path, "a", "b")
    with open(prompts, "ab") as file:
        file.write(b"x" * 200_000)
    counted = Source.open

    def opened(path: str) -> Source:
        found = counted(path)
        # As of a pipe: what is wrong with the end shows once it is read.
        monkeypatch.setattr(source_module, "MAX_SKIPPED", 100_000)
        return found

    monkeypatch.setattr(Source, "open", opened)
    assert run(prompts, out, engine=FakeEngine()) == 5
    assert ids(out) == ["line-1", "line-2"]
    assert "line 3 of" in capsys.readouterr().err


POISON = [
    b'{"prompt": "a", "max_tokens": 1' + b"0" * 400 + b"}",
    b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}",
    b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
    b'{"prompt": "a", "n": 1' + b"0" * 400 + b"}",
    b'{"prompt": "a", "temperature": 1e999}',
    b"[" * 100_000,
    b'{"prompt": "\\ud800"}',
    b"\xff\xfe",
    b"\0\0",
    b'{"messages": [[[]]]}',
]


def test_no_line_poisons_a_run_or_its_resumption(
    out: Path, monkeypatch: pytest.MonkeyPatch, pipe_in: Callable[[bytes], None]
) -> None:
    monkeypatch.setattr(source_module, "MAX_LINE", 200_000)
    long = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    lines = [b'{"prompt": "first"}', *POISON, long, b'{"prompt": "last", "custom_id": 5}']
    data = b"".join(line + b"\n" for line in lines)
    for flags in ([], ["--resume"]):
        pipe_in(data)
        engine = FakeEngine()
        assert run("-", out, *flags, engine=engine) == (0 if flags else 1)
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(found) == len(lines)
        answered = {record["custom_id"] for record in found if record["error"] is None}
        assert answered == {"line-1", "5"}
        assert engine.prompts == ([] if flags else ["first", "last"])
        assert max(len(record["error"]["message"]) for record in found if record["error"]) < 300
