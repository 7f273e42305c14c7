from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgemoe.cli.exits import FileTrouble
from edgemoe.cli.run.results import Results
from tests.support import ROOT


def test_records_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    results = Results.open(str(path))
    results.begin()
    for number, line in enumerate([b"1\n", b"2\n"], 1):
        results.write(line)
        assert results.written == number
        assert path.read_bytes().endswith(line)
    assert path.read_bytes() == b"1\n2\n"
    results.close()


def test_a_file_with_something_in_it_is_refused_or_replaced_only_at_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with pytest.raises(
        FileTrouble, match=r"out.jsonl is not empty; give another file with -o, --resume to go on, or --overwrite"
    ):
        Results.open(str(path))
    results = Results.open(str(path), overwrite=True)
    assert path.read_text() == "old\n"
    results.begin()
    results.write(b"{}\n")
    results.close()
    assert path.read_text() == "{}\n"


def test_a_file_that_is_resumed_keeps_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"1\n2\n3")
    results = Results.open(str(path), resume=True)
    results.begin(keep=4)
    results.write(b"4\n")
    results.close()
    assert path.read_bytes() == b"1\n2\n4\n"


def test_nothing_can_be_resumed_from_what_is_no_file() -> None:
    with pytest.raises(FileTrouble, match="/dev/null is no regular file, so nothing in it can be resumed"):
        Results.open("/dev/null", resume=True)


def test_two_runs_cannot_write_to_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "out.jsonl")
    first = Results.open(path)
    code = "import sys; from edgemoe.cli.run.results import Results; Results.open(sys.argv[1], overwrite=True)"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "another run is writing to" in done.stderr
    first.close()
    Results.open(path).close()


def test_an_empty_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.touch()
    results = Results.open(str(path))
    results.begin()
    results.write(b"1\n")
    results.close()
    assert path.read_bytes() == b"1\n"


def test_what_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="is a directory"):
        Results.open(str(tmp_path))
    with pytest.raises(FileTrouble, match=r"cannot write .*missing/out: no such file or directory"):
        Results.open(str(tmp_path / "missing" / "out"))


def test_a_device_may_take_the_results() -> None:
    results = Results.open("/dev/null")
    results.begin()
    results.write(b"1\n")
    assert results.written == 1
    results.close()


def test_a_full_disk_names_what_is_safe() -> None:
    results = Results.open("/dev/full")
    with pytest.raises(FileTrouble, match=r"cannot write to /dev/full any more: no space left.*; 0 results written"):
        results.write(b"1\n")
    results.close()


def test_a_line_that_fails_half_way_is_taken_back(tmp_path: Path) -> None:
    """A limit on the size of files ends a write in the middle, as a full disk does."""
    path = tmp_path / "out.jsonl"
    code = (
        "import resource, sys; from edgemoe.cli.run.results import Results\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "results = Results.open(sys.argv[1])\n"
        "[results.write(b'x' * 39 + b'\\n') for _ in range(9)]"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "any more: file too large; 2 results written so far" in done.stderr
    assert path.read_bytes() == (b"x" * 39 + b"\n") * 2


def test_standard_output(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for path in (None, "-"):
        results = Results.open(path)
        results.begin()
        results.write(b"1\n")
        results.close()
    assert capfdbinary.readouterr().out == b"1\n1\n"


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileTrouble, match=r"^cannot write .*: nobody reads this pipe; give another file with -o"):
        Results.open(str(pipe))


def test_a_pipe_may_be_read_slowly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    line = 300_000 * b"x" + b"\n"
    read: list[bytes] = []

    def consume() -> None:
        with pipe.open("rb") as file:
            time.sleep(0.2)
            read.append(file.read())

    reader = threading.Thread(target=consume)
    reader.start()
    deadline = time.monotonic() + 5
    while True:
        try:
            results = Results.open(str(pipe))
            break
        except FileTrouble:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    results.write(line)
    results.close()
    reader.join()
    assert read == [line]


def test_a_folder_takes_no_results(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="^cannot write .*: is a directory"):
        Results.open(str(tmp_path))
