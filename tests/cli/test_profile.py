from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemoe.cli.main import main
from edgemoe.measure.profiler import ProfileProgress
from edgemoe.plan.moesd import tokens_per_cycle
from edgemoe.plan.profile import Profile
from tests.support.fake_engine import FakeFactory
from tests.support.profiles import CARD, known_model, known_profile


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a profile was asked for; each is that of a machine that never was, at once."""
    asked: list[Any] = []

    def take(blueprint: Any, config: Any, on_progress: Any) -> Any:
        asked.append((blueprint.checkpoint.name, config))
        return known_profile()

    monkeypatch.setattr("edgemoe.measure.profiler.take_profile", take)
    return asked


def half_profile() -> Profile:
    """That of a machine with slots for half of the experts."""
    made = known_profile()
    points = [replace(point, cache_share=0.5) if point.cache_share == 1 else point for point in made.points]
    return replace(made, points=tuple(points))


def titled(out: str) -> tuple[list[str], list[str]]:
    """The titles of the tables, and the first row of each."""
    tables = [table.splitlines() for table in out.split("\n\n")]
    return [table[0] for table in tables], [table[2] for table in tables if len(table) > 2]


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
    assert rows[36:38] == ["", "23 tokens that choose evenly want 95 % of a layer's 32 experts"]
    assert [row.split(" ")[0] for row in rows[38:] if row] == ["drafts", "one"]
    assert "measuring takes a minute or two" in err
    assert f"kept in {tmp_path}" in err
    (model, config), *more = taken
    assert (model, config.link_gbps, config.expert_cache, more) == ("edgemoe-demo", 4.0, "50%", [])
    assert files(tmp_path) == ["profile.json"]
    assert factory.asked == [], "no engine is loaded"


def test_the_slots_that_there_are_have_a_table_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgemoe.measure.profiler.take_profile", lambda *of: half_profile())
    assert main(["profile", "--state-folder", "none"]) == 0
    titles, first = titled(capsys.readouterr().out)
    assert titles[:4] == [
        "passes",
        "predicted, all experts resident, 70% of the drafted tokens right, 3 and 8 drafted",
        "predicted, slots for 50% of the experts, 70% of the drafted tokens right, 3 and 8 drafted",
        "23 tokens that choose evenly want 95 % of a layer's 32 experts",
    ]
    model = known_model()
    plain, verify = model.hit_rate(0.5, 1), model.hit_rate(0.5, 1, 4)
    speed, gain = model.tokens_per_second(1, plain), model.speedup(1, 3, tokens_per_cycle(0.7, 3), plain, verify)
    assert first[2].split()[1:5] == [
        f"{speed:.1f}",
        "4.0",
        f"{model.target_efficiency(1, 3, plain, verify):.2f}",
        f"{gain:.2f}",
    ]
    assert first[1] != first[2]


def test_json_is_the_profile_and_what_the_tables_tell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = half_profile()
    monkeypatch.setattr("edgemoe.measure.profiler.take_profile", lambda *of: made)
    assert main(["profile", "--json", "--state-folder", "none"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    predicted = told.pop("predicted")
    assert told == json.loads(json.dumps(made.to_dict()))
    assert "kept" not in err
    assert [sentence.split(" ")[0] for sentence in predicted["verdict"]] == ["drafts", "one"]
    assert (predicted["acceptance"], predicted["full_activation"]) == (0.7, 23)
    assert [each["cache_share"] for each in predicted["slots"]] == [1.0, 0.5]
    assert main(["profile", "--state-folder", "none"]) == 0
    _, first = titled(capsys.readouterr().out)
    for slots, row in zip(predicted["slots"], first[1:3], strict=True):
        assert [each["batch"] for each in slots["batches"]] == [1, 2, 4, 8, 16, 32, 64]
        one = slots["batches"][0]
        assert (one["hit_rate"] == 1) == (slots["cache_share"] == 1)
        cells = [str(one["batch"]), f"{one['tokens_per_second']:.1f}", f"{one['experts']:.1f}"]
        for worth in one["drafts"]:
            cells += [f"{worth['target_efficiency']:.2f}", f"{worth['speedup']:.2f}", "x"]
        assert row.split() == cells
        assert [worth["drafted"] for worth in one["drafts"]] == [3, 8]


def test_what_was_measured_of_a_card_comes_below_the_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = replace(known_profile(), card=CARD)
    monkeypatch.setattr("edgemoe.measure.profiler.take_profile", lambda *of: made)
    assert main(["profile", "--state-folder", "none"]) == 0
    assert capsys.readouterr().out.splitlines()[-10:-5] == [
        "",
        "the device reads its memory at 350.0 GB/s and takes a kernel every 5.0 us; "
        "the host has what it tells after 25.0 us",
        "records are copied at 24.0 GB/s, beside the CPU's kernels at 20.0 GB/s; "
        "these read records at 40.0 GB/s, beside copies at 30.0 GB/s",
        "by these bandwidths 60% of the missing experts are the CPU's to compute",
        "",
    ]
    made = replace(made, card=replace(CARD, cpu=0.0, cpu_beside=0.0))
    assert main(["profile", "--state-folder", "none"]) == 0
    assert "records are copied at 24.0 GB/s; the CPU has no kernels for them" in capsys.readouterr().out
    assert main(["profile", "--json", "--state-folder", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["card"]["vram"] == 350e9


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
    nowhere, folder = tmp_path / "no" / "profile.svg", tmp_path / "folder.svg"
    assert main(["profile", "--plot", str(nowhere)]) == 5
    said = f"cannot write {nowhere}: there is no folder {tmp_path / 'no'}; give another file with --plot"
    assert said in capsys.readouterr().err
    folder.mkdir()
    assert main(["profile", "--plot", str(folder)]) == 5
    assert f"cannot write {folder}: it is a folder, or write-protected; give another" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["profile", "--plot", "profile.svg"]) == 2
    assert "matplotlib is not installed; get it with pip install 'edgemoe[plot]'" in capsys.readouterr().err
    assert taken == []


def test_a_picture_that_cannot_be_written_is_file_trouble_after_all_else(
    taken: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*of: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgemoe.plan.profile_plot.draw", full)
    picture = tmp_path / "profile.svg"
    assert main(["profile", "--state-folder", str(tmp_path), "--plot", str(picture)]) == 5
    out, err = capsys.readouterr()
    assert f"cannot write {picture}: no space left on device; give another file with --plot" in err
    assert "speed-up at 8" in out
    assert files(tmp_path) == ["profile.json"]


def test_a_folder_that_takes_no_files_is_told_before_measuring(
    taken: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert main(["profile", "--state-folder", str(tmp_path / "file" / "state")]) == 5
    err = capsys.readouterr().err
    assert "give another with --state-folder, or none" in err
    assert taken == []


def test_a_terminal_shows_what_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def take(blueprint: Any, config: Any, on_progress: Any) -> Profile:
        for number in range(5):
            on_progress(ProfileProgress(f"{number} x 4 tokens", number / 5))
            time.sleep(0.15)
        return known_profile()

    monkeypatch.setattr("edgemoe.measure.profiler.take_profile", take)
    assert main(["profile", "--state-folder", "none"]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "%" in line] == [
        "edgemoe: 25% is measured",
        "edgemoe: 50% is measured",
        "edgemoe: 75% is measured",
    ]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["profile", "--state-folder", "none"]) == 0
    err = capsys.readouterr().err
    assert "3 x 4 tokens" in err
    assert "60%" in err


def test_an_interrupted_profile_keeps_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(blueprint: Any, config: Any, on_progress: Any) -> Profile:
        os.kill(os.getpid(), signal.SIGINT)
        for number in range(100):
            time.sleep(0.02)
            on_progress(ProfileProgress("1 x 1 tokens", number / 100))
        return known_profile()

    monkeypatch.setattr("edgemoe.measure.profiler.take_profile", take)
    assert main(["profile", "--state-folder", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("edgemoe: error: interrupted\n")
    assert files(tmp_path) == []
