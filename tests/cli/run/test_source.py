from __future__ import annotations

import io
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemoe.cli.exits import FileTrouble
from edgemoe.cli.run import source as source_module
from edgemoe.cli.run.source import Line, Source


def source(tmp_path: Path, data: bytes, name: str = "prompts.txt") -> Source:
    path = tmp_path / name
    path.write_bytes(data)
    return Source.open(str(path))


def test_lines_keep_their_number_and_lose_their_ending(tmp_path: Path) -> None:
    opened = source(tmp_path, b"\xef\xbb\xbfone\r\n\n   \n two \nthr\xc3\xa9\xc3\xa9")
    assert list(opened.lines()) == [Line(1, "one"), Line(4, " two "), Line(5, "thréé")]
    assert opened.total == 3
    opened.close()


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    opened = source(tmp_path, "a\u2028b\x0bc\n".encode())
    assert list(opened.lines()) == [Line(1, "a\u2028b\x0bc")]
    opened.close()


@pytest.mark.parametrize(("name", "expected"), [("a.jsonl", True), ("a.JSONL", True), ("a.json", False), ("a", False)])
def test_the_name_tells_jsonl(tmp_path: Path, name: str, expected: bool) -> None:
    opened = source(tmp_path, b"x\n", name)
    assert opened.is_jsonl is expected
    opened.close()


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    opened = source(tmp_path, b"")
    assert (list(opened.lines()), opened.total) == ([], 0)
    opened.close()


def test_files_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="there is no file .*missing"):
        Source.open(str(tmp_path / "missing"))
    with pytest.raises(FileTrouble, match="is a folder"):
        Source.open(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(FileTrouble, match="not a directory"):
        Source.open(str(tmp_path / "file" / "below"))


def test_text_that_is_not_utf8_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match=r"is not UTF-8 text \(line 2\); convert it, for example with 'iconv"):
        source(tmp_path, b"good\nbad \xe9\ngood\n")


def test_standard_input_is_read_as_it_comes(pipe_in: Callable[[bytes], None]) -> None:
    pipe_in(b"one\nbad \xff\nthree")
    opened = Source.open("-")
    assert (opened.name, opened.total, opened.is_jsonl) == ("standard input", None, False)
    lines = opened.lines()
    assert next(lines) == Line(1, "one")
    bad = next(lines)
    assert (bad.number, bad.trouble[:22]) == (2, "it is not UTF-8 text; ")
    assert list(lines) == [Line(3, "three")]
    opened.close()
    assert isinstance(sys.stdin, io.TextIOWrapper)
    assert not sys.stdin.buffer.closed


def test_a_pipe_with_a_name_is_not_read_ahead(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"first\n")
    opened = Source.open(f"/dev/fd/{read_end}")
    assert opened.total is None
    os.close(write_end)
    assert list(opened.lines()) == [Line(1, "first")]
    opened.close()
    os.close(read_end)


def test_it_knows_its_own_file_under_any_name(tmp_path: Path) -> None:
    opened = source(tmp_path, b"x\n")
    (tmp_path / "link").symlink_to(tmp_path / "prompts.txt")
    (tmp_path / "other").write_bytes(b"x\n")
    assert opened.is_file(str(tmp_path / "link"))
    assert not opened.is_file(str(tmp_path / "other"))
    assert not opened.is_file(str(tmp_path / "missing"))
    opened.close()


def test_a_line_may_be_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    long = "é" * 100_000
    opened = source(tmp_path, f"a\n{long}\n\n{long}b\nc".encode())
    expected = [Line(1, "a"), Line(2, long), Line(4, f"{long}b"), Line(5, "c")]
    assert list(opened.lines()) == expected
    opened.rewind()
    assert list(opened.lines()) == expected
    opened.close()


def test_a_pipe_says_whether_a_line_is_there() -> None:
    read_end, write_end = os.pipe()
    opened = Source.open(f"/dev/fd/{read_end}")
    lines = opened.lines()
    assert not opened.ready()
    os.write(write_end, b"one\ntwo\n")
    assert opened.ready()
    assert next(lines) == Line(1, "one")
    assert opened.ready()
    assert next(lines) == Line(2, "two")
    assert not opened.ready()
    os.close(write_end)
    assert opened.ready()
    assert next(lines, None) is None
    opened.close()
    os.close(read_end)


def test_a_file_is_always_ready(tmp_path: Path) -> None:
    opened = source(tmp_path, b"")
    assert opened.ready()
    opened.close()


def test_a_closed_standard_input_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FileTrouble, match="standard input is closed; give a file of requests"):
        Source.open("-")


def test_of_a_line_that_is_too_long_the_beginning_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "MAX_LINE", 200_000)
    long = b"<" + 300_000 * b"x"
    opened = source(tmp_path, b"a\n" + long + b"\nb\n" + long)
    first, second, third, fourth = opened.lines()
    assert (first, third) == (Line(1, "a"), Line(3, "b"))
    for line in (second, fourth):
        assert line.text == "<" + 255 * "x"
        assert line.trouble == "it has 293.0 KiB, more than the 195.3 KiB that a line may have"
    assert opened.total == 4
    opened.close()


def test_a_line_of_the_longest_length_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "MAX_LINE", 200_000)
    opened = source(tmp_path, 200_000 * b"x" + b"\n")
    assert [(len(line.text), line.trouble) for line in opened.lines()] == [(200_000, "")]
    opened.close()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no endless device")
def test_an_input_without_a_line_feed_is_given_up() -> None:
    opened = Source.open("/dev/zero")
    tracemalloc.start()
    with pytest.raises(
        FileTrouble, match=r"^line 1 of /dev/zero has no end within 1\.0 GiB; give a file with a request"
    ):
        list(opened.lines())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 << 20
    opened.close()
