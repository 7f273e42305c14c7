"""A process without some of the standard streams, or with one that nobody reads: results complete, exit code right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -c 'import sys; from edgemoe.cli.main import main; sys.exit(main())'"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": "a", "max_tokens": 2, "temperature": 0})] * 3
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(folder: Path, command: str) -> tuple[int, str]:
    """The exit code of a command line of a shell, and all that it printed."""
    line = command.replace("edgemoe", COMMAND, 1)
    environment = os.environ | {"EDGEMOE_STATE_FOLDER": "none"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "streams", ["2>&-", "-v 2>&1 | head -1", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"], ids=str
)
def test_a_run_is_complete_whatever_becomes_of_its_streams(streams: str, folder: Path) -> None:
    """localllm#20, tqdm/tqdm#1523: progress that nobody can read must not cost the results."""
    code, said = run(folder, f"edgemoe run requests.jsonl -o out {streams}")
    assert code == 0, said
    assert len((folder / "out").read_text().splitlines()) == 3
    assert "Traceback" not in said


def test_results_that_nobody_would_get_are_refused(folder: Path) -> None:
    code, said = run(folder, "edgemoe run requests.jsonl 2>&1 >&-")
    assert code == 5
    assert said == ("edgemoe: error: standard output is closed, so nobody would get the results; give a file with -o\n")


@pytest.mark.parametrize(
    "command", ["edgemoe --version >&-", "edgemoe --help 2>&1 >&- | head -1", "edgemoe plan >&- 2>&-"]
)
def test_what_prints_only_ends_well(command: str, folder: Path) -> None:
    code, said = run(folder, command)
    assert (code, said) == (0, "")


def test_an_answer_needs_no_standard_error(folder: Path) -> None:
    code, said = run(folder, "edgemoe chat -p hi -n 3 2>&-")
    assert code == 0
    assert said.strip()


@pytest.mark.parametrize("option", ["-p", "-sys", "--stop"])
def test_a_text_that_is_no_text_is_wrong_usage(option: str, folder: Path) -> None:
    code, said = run(folder, f"edgemoe chat -p hi {option} $'\\xff\\xfe'")
    assert code == 2
    assert "it is not UTF-8 text" in said
    assert len(said.splitlines()) == 1


def test_a_path_may_have_any_bytes(folder: Path) -> None:
    code, said = run(folder, "edgemoe run requests.jsonl -o $'\\xff'")
    assert code == 0, said
    assert len((folder / os.fsdecode(b"\xff")).read_text().splitlines()) == 3
