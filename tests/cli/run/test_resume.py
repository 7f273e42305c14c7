"""A run that goes on where an earlier one ended, however that one ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgemoe.cli.main import main
from edgemoe.cli.run.finished import Finished, read_finished
from edgemoe.cli.run.ledger import Ledger
from edgemoe.errors import CheckpointError
from tests.support import ROOT
from tests.support.fake_engine import FakeEngine, FakeFactory

COUNT = 8


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines: list[Any] = [{"prompt": f"p{number}" + " and on" * (number % 3)} for number in range(COUNT)]
    lines[3] = {"prompt": "p", "n": 0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def run(prompts: Path | str, out: Path, *flags: str, engine: FakeEngine | None = None) -> int:
    return main(["run", str(prompts), "-o", str(out), "-m", "x", *flags], engine=FakeFactory(engine or FakeEngine()))


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def told(path: Path) -> dict[str, str]:
    """What was said to each id; ids are there once."""
    found = {}
    for line in lines(path):
        record = json.loads(line)
        assert record["custom_id"] not in found
        body = (record["response"] or {}).get("body", {})
        found[record["custom_id"]] = body["choices"][0]["text"] if body else record["error"]["message"]
    return found


def test_record_ids_say_what_was_asked(prompts: Path, out: Path, tmp_path: Path) -> None:
    run(prompts, out)
    run(prompts, tmp_path / "again")
    run(prompts, tmp_path / "other", "--temp", "0.5")
    ids = [sorted(json.loads(line)["id"] for line in lines(path)) for path in (out, tmp_path / "again")]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == COUNT
    assert {len(each) for each in ids[0]} == {len("batch_req_") + 32}
    assert not set(ids[0]) & {json.loads(line)["id"] for line in lines(tmp_path / "other")}


@pytest.mark.parametrize("kept", range(COUNT + 1))
def test_only_what_has_no_result_is_answered(
    kept: int, prompts: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(prompts, out)
    whole, expected = lines(out), told(out)
    out.write_bytes(b"".join(whole[:kept]))
    capsys.readouterr()
    engine = FakeEngine()
    code = run(prompts, out, "--resume", engine=engine)
    assert told(out) == expected
    assert lines(out)[:kept] == whole[:kept]
    failed = sum(b'"error": {' in line for line in whole[kept:])
    assert code == failed
    assert len(engine.prompts) == COUNT - kept - failed
    err = capsys.readouterr().err
    if 0 < kept < COUNT:
        assert f"edgemoe: {out} has {kept} result" in err
        assert f"; {kept} more had a result already" in err


def test_no_model_is_loaded_when_nothing_is_left(
    prompts: Path, out: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    run(prompts, out)
    capsys.readouterr()
    assert main(["run", str(prompts), "-o", str(out), "-m", "x", "--resume"], engine=factory) == 0
    assert factory.asked == []
    assert capsys.readouterr().err.endswith("edgemoe: no request is left to answer\n")


@pytest.mark.parametrize("existing", [None, b""])
def test_there_need_be_nothing_to_resume(existing: bytes | None, prompts: Path, out: Path) -> None:
    if existing is not None:
        out.write_bytes(existing)
    assert run(prompts, out, "--resume") == 1
    assert len(told(out)) == COUNT


@pytest.mark.parametrize("cut", ["end of line", "middle", "start", "zeros", "not JSON"])
def test_half_a_line_at_the_end_is_cut_off(
    cut: str, prompts: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(prompts, out)
    whole, expected = lines(out), told(out)
    last = whole[4]
    torn = {
        "end of line": last[:-1],
        "middle": last[:100],
        "start": last[:3],
        "zeros": bytes(50),
        "not JSON": last[:80] + b"\n",
    }[cut]
    out.write_bytes(b"".join(whole[:4]) + torn)
    capsys.readouterr()
    run(prompts, out, "--resume")
    assert told(out) == expected
    said = f"the last line of {out} was not whole and is cut off ({len(torn)} bytes)"
    assert said in capsys.readouterr().err


def test_a_failed_start_cuts_nothing_off(prompts: Path, out: Path) -> None:
    run(prompts, out)
    before = out.read_bytes()[:-10]
    out.write_bytes(before)
    broken = FakeFactory(error=CheckpointError("no config.json"))
    assert main(["run", str(prompts), "-o", str(out), "-m", "x", "--resume"], engine=broken) == 3
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [["--temp", "0.5"], ["--seed", "1"], ["--raw"], ["-sys", "s"], ["-m", "y"], ["--dtype", "float32"], ["-n", "9"]],
)
def test_results_of_other_settings_are_refused(
    flags: list[str], prompts: Path, out: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    run(prompts, out)
    out.write_bytes(b"".join(lines(out)[:4]))
    before = out.read_bytes()
    assert main(["run", str(prompts), "-o", str(out), "-m", "x", "--resume", *flags], engine=factory) == 5
    assert out.read_bytes() == before
    assert factory.asked == []
    err = capsys.readouterr().err
    assert f"{out} cannot be resumed: the result of 'line-1' is that of another request, or of other settings" in err
    assert "another file with -o, or --overwrite instead of --resume" in err


@pytest.mark.parametrize("flags", [["--batch", "4"], ["-t", "1"], ["--order", "input"], ["--expert-cache", "9"]])
def test_settings_that_decide_no_reply_may_change(flags: list[str], prompts: Path, out: Path) -> None:
    run(prompts, out)
    expected = told(out)
    out.write_bytes(b"".join(lines(out)[:4]))
    assert run(prompts, out, "--resume", *flags) == 0
    assert told(out) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("p1", "q1"), "the result of 'line-2' is that of another request"),
        (lambda text: "\n" + text, "the result of 'line-2' is that of another request"),
        (lambda text: text.split("\n", 1)[1], "the result of 'line-1' is that of another request"),
        (lambda text: text.splitlines()[0], "no line of .* asks for the result of 'line-4'"),
        (lambda text: "", "no line of .* asks for the result of 'line-4'"),
    ],
)
def test_results_of_another_input_are_refused(
    change: Callable[[str], str], said: str, prompts: Path, out: Path, factory: FakeFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run(prompts, out)
    before = b"".join(lines(out)[:4])
    out.write_bytes(before)
    prompts.write_text(change(prompts.read_text()))
    assert main(["run", str(prompts), "-o", str(out), "-m", "x", "--resume"], engine=factory) == 5
    assert factory.asked == []
    assert out.read_bytes() == before
    assert re.search(f"cannot be resumed: {said}", capsys.readouterr().err)


def test_an_input_may_grow(prompts: Path, out: Path) -> None:
    run(prompts, out)
    prompts.write_text(prompts.read_text() + '{"prompt": "new"}\r\n')
    engine = FakeEngine()
    assert run(prompts, out, "--resume", engine=engine) == 0
    assert engine.prompts == ["new"]
    assert len(told(out)) == COUNT + 1


def test_a_pipe_is_checked_as_it_comes(
    prompts: Path, out: Path, pipe_in: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run(prompts, out)
    expected = told(out)
    before = b"".join(lines(out)[:4])
    out.write_bytes(before)
    pipe_in(prompts.read_bytes().replace(b"p0", b"q0"))
    engine = FakeEngine()
    assert run("-", out, "--resume", engine=engine) == 5
    assert out.read_bytes() == before
    pipe_in(prompts.read_bytes())
    assert run("-", out, "--resume") == 0
    assert told(out) == expected
    pipe_in(prompts.read_bytes().splitlines()[0])
    assert run("-", out, "--resume") == 5
    assert "no line of standard input asks for the result of" in capsys.readouterr().err
    assert told(out) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}\n{\n{}\n", "its line 1 is no result: custom_id must be a text"),
        (b'{"custom_id": "a", "id": "b"}\n{\n{}\n', "its line 2 is not JSON; mend or remove it"),
        (b'{"custom_id": "a", "id": "b"}\n[1]\n', "its line 2 is no result: it is no object"),
        (b'{"custom_id": "a", "id": 3}\n', "its line 1 is no result: id must be a text"),
        (b'{"custom_id": "\\ud800", "id": "b"}\n', "its line 1 is no result: custom_id holds half of a character"),
        (b'{"custom_id": "a", "id": "b"}\n{"custom_id": "a", "id": "b"}\n', "line 2 is a second result of 'a'"),
        (b"something that is dear to its owner", "its last line is no result"),
        (b'{"id": "batch_request', "its last line is no result"),
    ],
)
def test_what_no_run_has_written_is_refused_and_left_alone(
    content: bytes, said: str, prompts: Path, out: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    out.write_bytes(content)
    assert main(["run", str(prompts), "-o", str(out), "-m", "x", "--resume"], engine=factory) == 5
    assert said in capsys.readouterr().err
    assert out.read_bytes() == content
    assert factory.asked == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume"], "--resume needs the file of results to go on with; give it with -o"),
        (["--resume", "-o", "-"], "--resume needs the file of results"),
        (["--resume", "-o", "out", "--overwrite"], "give one of the two"),
    ],
)
def test_wrong_usage(flags: list[str], said: str, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(prompts), *flags], engine=FakeFactory()) == 2
    assert said in capsys.readouterr().err


def test_results_are_read_one_at_a_time(out: Path) -> None:
    out.write_bytes(b"".join(b'{"custom_id": "%d", "id": "r%d"}\n' % (n, n) for n in range(3)) + b'{"id": "ba')
    ledger = Ledger()
    assert read_finished(str(out), ledger) == Finished(3, out.stat().st_size - 10, 10)
    assert (ledger.result_of("1"), ledger.result_of("3")) == ("r1", None)
    ledger.close()


ENDLESS_WORK = """
import sys, time
from tests.support.fake_engine import FakeEngine, FakeFactory
from edgemoe.cli.main import main
engine = FakeEngine(before_word=lambda word: time.sleep(0.002))
sys.exit(main(["run", sys.argv[1], "-o", sys.argv[2], "-m", "x", "--resume"], engine=FakeFactory(engine)))
"""


def test_a_killed_run_loses_nothing(tmp_path: Path, out: Path) -> None:
    """The longer the lines, the likelier one is torn: a kill ends a write between two pages."""
    prompts = tmp_path / "long.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} " + "x" * 50_000}) + "\n" for n in range(300)))
    for wanted in (3, 13, 30):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_WORK, str(prompts), str(out)], cwd=ROOT, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not out.exists() or out.read_bytes().count(b"\n") < wanted:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wanted <= out.read_bytes().count(b"\n") < 300
    assert run(prompts, out, "--resume") == 0
    run(prompts, tmp_path / "straight")
    assert told(out) == told(tmp_path / "straight")
