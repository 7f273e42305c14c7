from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgemoe import __version__
from edgemoe.cli.exits import DESCRIPTION, Exit
from edgemoe.cli.main import main
from edgemoe.errors import CheckpointError, EdgeMoEError, PlanError, RequestError
from tests.support import ROOT
from tests.support.fake_engine import FakeFactory


def python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_names_the_commands_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.findall(r"^    (\w+) ", out, re.MULTILINE) == [
        "run", "chat", "serve", "plan", "models", "pack", "eval", "profile", "affinity", "doctor",
    ]  # fmt: skip
    assert [int(number) for number in re.findall(r"^  (\d+) ", DESCRIPTION, re.MULTILINE)] == sorted(Exit)
    assert DESCRIPTION in out


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    done = python(
        "import sys, time; begun = time.perf_counter(); from edgemoe.cli.main import main; code = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'rich', 'numpy', 'numba', 'psutil'} & set(sys.modules)\n"
        "print(code, sorted(heavy), time.perf_counter() - begun, file=sys.stderr)"
    )
    assert done.returncode == 0, done.stderr
    code, heavy, seconds = done.stderr.split()
    assert (code, heavy) == ("0", "[]")
    # Imports alone take a tenth; whatever the machine is doing, they are not PyTorch's.
    assert float(seconds) < 5


def test_file_trouble_is_told_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from edgemoe.cli.main import main; code = main(['run', '/no/such/file'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    assert python(code).stdout == "5 False\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgemoe {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no command given; try 'edgemoe chat', or see 'edgemoe --help'"),
        (["run"], "the following arguments are required: FILE; see 'edgemoe run --help'"),
        (["plan", "--device", "tpu"], "'tpu' is not known"),
        (["chatt"], "chatt"),
    ],
)
def test_wrong_usage_is_one_sentence(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgemoe: error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("model x has no config.json; choose another with -m"), 3),
        (PlanError("the experts need 9 GiB of 8 GiB; give --expert-cache 7GiB"), 4),
        (RequestError("top_k is 0; give --top-k 1 or more"), 1),
        (EdgeMoEError("something else"), 1),
    ],
)
def test_an_error_is_one_sentence_and_its_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "-m", "x"], engine=FakeFactory(error=error)) == code
    assert capsys.readouterr() == ("", f"edgemoe: error: {error}\n")


def test_a_fault_of_ours_is_a_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", "x"], engine=FakeFactory(error=KeyError("layers"))) == Exit.INTERNAL
    assert capsys.readouterr().err == (
        "edgemoe: error: unexpected KeyError: 'layers' (set EDGEMOE_TRACEBACK=1 to see where)\n"
    )


def test_the_traceback_is_there_for_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEMOE_TRACEBACK", "1")
    assert main(["plan", "-m", "x"], engine=FakeFactory(error=PlanError("too large"))) == 4
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("edgemoe: error: too large\n")


def test_ctrl_c_while_loading(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(FakeFactory):
        def plan_for(self, *args: object, **settings: object) -> object:  # type: ignore[override]
            raise KeyboardInterrupt

    assert main(["plan", "-m", "x"], engine=Interrupted()) == 130  # type: ignore[arg-type]
    assert capsys.readouterr().err == "edgemoe: error: interrupted\n"


def test_a_closed_pipe_ends_quietly() -> None:
    code = (
        "import sys; from edgemoe.cli.main import main; from tests.support.fake_engine import FakeFactory\n"
        "sys.stdin.readline(); sys.exit(main(['plan', '-m', 'x', '--json'], engine=FakeFactory()))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(b"go\n", timeout=60)
    assert (process.returncode, err) == (5, b"")


def test_a_full_disk_below_standard_output_is_file_trouble() -> None:
    code = "import sys; from edgemoe.cli.main import main; from tests.support.fake_engine import FakeFactory\n"
    code += "sys.exit(main(['plan', '-m', 'x'], engine=FakeFactory()))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (
        5, b"edgemoe: error: cannot write to standard output: no space left on device\n",
    )  # fmt: skip
