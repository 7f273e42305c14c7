from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgemoe.cli.main import main
from tests.support.fake_engine import FakeFactory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def files(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob("*") if file.is_file()]


def test_it_is_computed_once_and_said_where(
    folder: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["affinity", "--state-folder", str(folder)], engine=factory) == 0
    out, err = capsys.readouterr()
    said = re.fullmatch(r"edgemoe-demo: affinity of 192 experts in 6 MoE layers, 12\.0 KiB, kept in (.+)\n", out)
    assert said is not None
    assert files(folder) == ["affinity.safetensors"]
    assert Path(said[1]).is_file()
    assert err.count("\n") == 1
    assert "the small demo model that ships with edgemoe is used" in err
    assert main(["affinity", "--state-folder", str(folder)]) == 0
    assert capsys.readouterr().out == out.replace("kept in", "kept already in")
    assert factory.asked == [], "no engine is loaded"


def test_the_folder_may_come_from_the_environment_or_be_the_users_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert main(["affinity"]) == 0
    assert str(folder / "cache" / "edgemoe") in capsys.readouterr().out
    monkeypatch.setenv("EDGEMOE_STATE_FOLDER", str(folder / "own"))
    assert main(["affinity"]) == 0
    assert str(folder / "own" / "edgemoe-demo") in capsys.readouterr().out
    assert files(folder / "cache") == files(folder / "own") == ["affinity.safetensors"]


def test_there_is_progress_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["affinity", "--state-folder", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "affinity" in err
    assert out.count("\n") == 1


def test_to_keep_nothing_is_wrong_usage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["affinity", "--state-folder", "none"]) == 2
    assert "--state-folder: none keeps nothing, and affinity is for keeping; give a folder" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_bytes(b"")
    assert main(["affinity", "--state-folder", str(folder / "state")]) == 5
    err = capsys.readouterr().err
    assert f"cannot keep files in {folder / 'state'}: " in err
    assert err.endswith("; give another with --state-folder\n")


def test_a_model_that_is_not_there_is_a_checkpoint_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["affinity", "-m", "./no-such-model", "--state-folder", str(folder)]) == 3
    assert "./no-such-model does not exist" in capsys.readouterr().err
    assert main(["affinity", "-m", "no/model", "--offline", "--state-folder", str(folder)]) == 3
    assert "run once without --offline" in capsys.readouterr().err
    assert not folder.exists()


def test_an_interruption_keeps_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgemoe.cache.safetensors_store import SafetensorsStore

    def interrupt(*of: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsStore, "read", interrupt)
    assert main(["affinity", "--state-folder", str(folder)]) == 130
    assert capsys.readouterr().err.endswith("edgemoe: error: interrupted\n")
    assert files(folder) == []
