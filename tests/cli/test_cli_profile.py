from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeFactory
from profiles import known_profile

from edgemoe.cli.main import main


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a profile was asked for; each is that of a machine that never was, at once."""
    asked: list[Any] = []

    def take(blueprint: Any, config: Any, on_progress: Any) -> Any:
        asked.append((blueprint.checkpoint.name, config))
        return known_profile()

    monkeypatch.setattr("edgemoe.profiler.take_profile", take)
    return asked


def files(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob("*") if file.is_file()]


def test_what_was_measured_and_what_is_predicted(
    taken: list[Any], tmp_path: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["profile", "--state-folder", str(tmp_path), "--link-gbps", "4", "--device", "cpu", "--expert-cache", "50%"]
    assert main(line, engine=factory) == 0
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert rows[:3] == [
        "passes",
        "batch  tokens each  slots  measured  predicted  experts a layer  misses",
        "1      1            100%   18.5 ms   18.5 ms    4.0              0.0",
    ]
    assert rows[27:30] == [
        "predicted, all experts resident, 70% of the drafted tokens right, 3 and 8 drafted",
        "batch  tokens/s  experts a layer  efficiency at 3  speed-up at 3  efficiency at 8  speed-up at 8",
        "1      54.1      4.0              0.48             1.20 x         0.28             0.90 x",
    ]
    # 0.875^23 = 0.046 is the first power below a twentieth.
    assert rows[36:] == ["", "23 tokens that choose evenly want 95 % of a layer's 32 experts"]
    assert "measuring takes a minute or two" in err
    assert f"kept in {tmp_path}" in err
    (model, config), *more = taken
    assert (model, config.link_gbps, config.expert_cache, more) == ("edgemoe-demo", 4.0, "50%", [])
    assert files(tmp_path) == ["profile.json"]
    assert factory.asked == [], "no engine is loaded"


def test_json_is_the_profile(taken: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--json", "--state-folder", "none"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(json.dumps(known_profile().to_dict()))
    assert "kept" not in err


def test_a_table_on_a_terminal(
    taken: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["profile", "--state-folder", "none"]) == 0
    assert "speed-up at 8" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["profile.svg", "profile.PNG"])
def test_a_picture(taken: list[Any], tmp_path: Path, name: str) -> None:
    assert main(["profile", "--state-folder", "none", "--plot", str(tmp_path / name)]) == 0
    start = (tmp_path / name).read_bytes()[:64]
    assert b"<?xml" in start if name.endswith("svg") else start.startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_made_is_refused_before_measuring(
    taken: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--plot", "profile.txt"]) == 2
    assert "argument --plot: profile.txt is neither .png nor .svg; give one of these" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["profile", "--plot", "profile.svg"]) == 2
    assert "matplotlib is not installed; get it with pip install 'edgemoe[plot]'" in capsys.readouterr().err
    assert taken == []


def test_a_picture_that_cannot_be_written_is_file_trouble(
    taken: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--state-folder", "none", "--plot", str(tmp_path / "no" / "profile.svg")]) == 5
    assert "give another file with --plot" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_told_before_measuring(
    taken: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert main(["profile", "--state-folder", str(tmp_path / "file" / "state")]) == 5
    err = capsys.readouterr().err
    assert "give another with --state-folder, or none" in err
    assert taken == []
