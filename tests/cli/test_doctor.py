from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from edgemoe.cli.doctor import _package, _read_speed
from edgemoe.cli.main import main
from edgemoe.errors import CheckpointError
from edgemoe.plan.machine import Gpu
from tests.support.fake_engine import FakeFactory


def checks(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_a_sound_machine(tmp_path: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(40 << 20)
    assert main(["doctor", "--json", "-m", str(tmp_path)], engine=factory) == 0
    found = checks(capsys)
    assert found["python"]["found"] == sys.version.split()[0]
    names = {"edgemoe", "torch", "transformers", "safetensors", "numba", "processor", "threads"}
    assert names | {"memory", "demo model", "model", "disk", "disk read", "pinned memory"} <= set(found)
    assert "free of" in found["memory"]["found"]
    assert found["disk read"]["found"].endswith("a second")
    assert found["demo model"] == {
        "name": "demo model", "status": "ok", "found": "fake can run on cpu in float32", "advice": "",
    }  # fmt: skip
    assert factory.asked == [{"model": None}, {"model": str(tmp_path)}]


@pytest.mark.parametrize("kept", [True, False])
def test_whether_compiled_code_is_kept(
    kept: bool, monkeypatch: pytest.MonkeyPatch, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgemoe.cache.compiled.is_kept", lambda: kept)
    assert main(["doctor", "--json"], engine=factory) == 0
    found = checks(capsys)["compiled code"]
    assert found["status"] == ("ok" if kept else "warning")
    assert ("NUMBA_CACHE_DIR" in found["advice"]) != kept


def test_a_problem_is_exit_code_1_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    missing = FakeFactory(error=CheckpointError("the demo model is missing; install edgemoe again"))
    assert main(["doctor"], engine=missing) == 1
    rows = [re.split(r"  +", line, maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert {status for status, _, _ in rows} <= {"ok", "warning", "problem"}
    assert [row for row in rows if row[0] == "problem"] == [["problem", "demo model", str(missing.error)]]


def test_a_model_that_is_no_folder_is_not_measured(factory: FakeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", "-m", "some/model"], engine=factory)
    found = checks(capsys)
    assert "is no folder on this machine" in found["disk"]["found"]
    assert "disk read" not in found


def test_packages_that_are_missing_or_too_old() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    missing = _package(requirements.Requirement("no-such-package>=1"))
    assert (missing.status, missing.found, missing.advice) == (
        "problem", "not installed", "pip install 'no-such-package>=1'",
    )  # fmt: skip
    old = _package(requirements.Requirement("rich>=999"))
    assert old.status == "problem"
    assert old.found.endswith("but >=999 is needed")
    assert _package(requirements.Requirement("rich>=1")).status == "ok"


def test_a_slow_disk_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1 << 20))
    assert _read_speed(file).found == "model.safetensors is too small to measure"
    os.truncate(file, 40 << 20)
    seconds = iter([0.0, 2.0])
    slow = _read_speed(file, clock=lambda: next(seconds))
    assert (slow.status, slow.found) == ("warning", "20.0 MiB a second")
    gone = _read_speed(tmp_path / "gone")
    assert (gone.status, gone.found) == ("problem", "gone: no such file or directory")


def gpu(capability: tuple[int, int] | None) -> Gpu:
    return Gpu(0, "Abacus 9", 12 << 30, 11 << 30, capability)


@pytest.mark.parametrize(
    ("capability", "told"),
    [
        (None, "Abacus 9, 11.0 GiB free of 12.0 GiB"),
        ((8, 0), "Abacus 9, 11.0 GiB free of 12.0 GiB, compute capability 8.0"),
        (
            (7, 5),
            "Abacus 9, 11.0 GiB free of 12.0 GiB, compute capability 7.5, "
            "below 8.0: checkpoints in bfloat16 run in float16",
        ),
    ],
)
def test_a_gpu_and_what_it_computes_in(
    capability: tuple[int, int] | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    factory: FakeFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("edgemoe.plan.machine.gpus", lambda: [gpu(capability)])
    assert main(["doctor", "--json"], engine=factory) == 0
    found = checks(capsys)["gpu 0"]
    assert (found["status"], found["found"]) == ("ok", told)


@pytest.mark.parametrize("why", ["", "Triton is not installed (pip install triton)"])
def test_whether_the_gpus_kernels_can_be_used(
    why: str, monkeypatch: pytest.MonkeyPatch, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgemoe.plan.machine.gpus", lambda: [gpu((8, 6))])
    monkeypatch.setattr("edgemoe.cache.accelerator.available", lambda: True)
    monkeypatch.setattr("edgemoe.kernels.triton.availability.missing", lambda: why)
    assert main(["doctor", "--json"], engine=factory) == 0
    found = checks(capsys)
    assert "cuda" not in found
    assert (found["triton"]["status"], found["triton"]["found"]) == (
        ("warning", why) if why else ("ok", "its kernels can be used")
    )


def test_without_a_gpu_its_kernels_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgemoe.cache.accelerator.available", lambda: False)
    monkeypatch.setattr("edgemoe.kernels.triton.availability.missing", lambda: pytest.fail("it is asked for"))
    assert main(["doctor", "--json"], engine=factory) == 0
    assert checks(capsys)["triton"] == {
        "name": "triton", "status": "ok", "found": "not needed without a GPU", "advice": "",
    }  # fmt: skip
