from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgemoe.cli.doctor import card, folders, memory, model, processor
from edgemoe.cli.doctor.installation import _package, _python
from edgemoe.cli.main import main
from edgemoe.errors import CheckpointError
from edgemoe.plan.machine import Gpu
from edgemoe.plan.plan import Plan
from edgemoe.plan.predicted_speed import PredictedSpeed
from tests.support.fake_engine import FakeFactory, FakePlan


def checks(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_a_sound_machine(tmp_path: Path, factory: FakeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(40 << 20)
    assert main(["doctor", "--json", "-m", str(tmp_path)], engine=factory) == 0
    found = checks(capsys)
    assert found["python"]["found"] == sys.version.split()[0]
    names = {"edgemoe", "packages", "extras", "processor", "threads", "other programs", "kernels", "swap"}
    names |= {"open files", "locked memory", "cache folder", "compiled code", "temporary folder", "gpu"}
    assert names | {"memory", "demo model", "model", "disk", "disk read", "experts", "profile", "bottleneck"} <= set(
        found
    )
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
    assert found["status"] == ("ok" if kept else "note")
    assert ("NUMBA_CACHE_DIR" in found["advice"]) != kept


def test_a_problem_is_exit_code_1_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    missing = FakeFactory(error=CheckpointError("the demo model is missing; install edgemoe again"))
    assert main(["doctor"], engine=missing) == 1
    rows = [re.split(r"  +", line, maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert {status for status, _, _ in rows} <= {"ok", "note", "problem"}
    assert [row for row in rows if row[0] == "problem"] == [["problem", "demo model", str(missing.error)]]


def test_a_model_that_is_no_folder_is_not_measured(factory: FakeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", "-m", "some/model"], engine=factory)
    found = checks(capsys)
    assert "is not on this machine" in found["disk"]["found"]
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
    assert folders.read_speed(file)[0].found == "model.safetensors is too small to measure"
    os.truncate(file, 40 << 20)
    seconds = iter([0.0, 2.0])
    slow, rate = folders.read_speed(file, clock=lambda: next(seconds))
    assert rate == 20 << 20
    assert (slow.status, slow.found) == ("note", "20.0 MiB a second")
    gone, _ = folders.read_speed(tmp_path / "gone")
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
        ("note", why) if why else ("ok", "its kernels can be used")
    )


def test_without_a_gpu_its_kernels_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgemoe.cache.accelerator.available", lambda: False)
    monkeypatch.setattr("edgemoe.kernels.triton.availability.missing", lambda: pytest.fail("it is asked for"))
    assert main(["doctor", "--json"], engine=factory) == 0
    assert not {"triton", "pinned memory"} & set(checks(capsys))


def test_a_card_in_a_narrow_slot() -> None:
    narrow = card._gpu(replace(gpu((8, 6)), driver="570.1", lanes=4, max_lanes=16))
    assert (narrow.status, narrow.found[-44:]) == ("note", "compute capability 8.6, driver 570.1, PCIe x4 of x16"[-44:])
    assert "slot with all lanes" in narrow.advice
    assert card._gpu(replace(gpu((8, 6)), lanes=16, max_lanes=16)).status == "ok"


def test_memory_that_is_not_locked_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*size: int, **kind: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: invalid argument\nMore lines")

    monkeypatch.setattr(torch, "empty", refuse)
    check = card._pinning()
    assert (check.status, check.found) == ("note", "refused: CUDA error: invalid argument")
    assert f"ulimit -l allows {memory.locked_memory()}" in check.advice


def test_a_python_that_is_not_tested() -> None:
    assert _python(["3.7", "3.8"]).status == "note"
    assert "use one of 3.7, 3.8" in _python(["3", "3.7", "3.8"]).advice
    assert _python([".".join(sys.version.split()[0].split(".")[:2])]).status == "ok"


def test_threads_that_the_system_gives_no_time() -> None:
    check = processor._threads(8, 1.5)
    assert (check.status, check.advice) == ("note", "--threads 1 is faster: more are stopped again and again")
    assert "the time of 1.5 cores" in check.found
    assert processor._threads(8, None).status == processor._threads(8, 8.0).status == "ok"


def test_programs_that_compute_beside() -> None:
    assert processor._load(0.4, 2).status == "ok"
    busy = processor._load(3.25, 2)
    assert (busy.status, busy.found) == ("note", "3.2 of 2 cores busy in the last minute")


@pytest.mark.parametrize(
    ("tokens", "widened", "status", "found"),
    [
        (64, False, "ok", "bf16 is multiplied as it is (AVX2)"),
        (64, True, "note", "bf16 is widened to float32, as this processor has no AVX512-BF16 (AVX2)"),
        (0, False, "note", "none for this processor (AVX2): PyTorch multiplies"),
    ],
)
def test_kernels(tokens: int, widened: bool, status: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.kernels.cpu.cpu_features.has", lambda feature: feature == "avx2")
    monkeypatch.setattr("edgemoe.kernels.cpu.kernel_choice.few_tokens", lambda dtype: tokens)
    monkeypatch.setattr("edgemoe.kernels.cpu.kernel_choice.widens", lambda dtype, columns: widened)
    check = processor._kernels()
    assert (check.status, check.found) == (status, found)


def test_memory_and_who_has_it() -> None:
    gib = 1 << 30
    check = memory._free(gib, 8 * gib, 32 * gib, [("firefox", 5 * gib)])
    assert (check.status, check.advice) == ("note", "close other programs before loading a model")
    told = "1.0 GiB free of 8.0 GiB, the limit of its control group; the machine has 32.0 GiB"
    assert check.found == f"{told}; of other programs, firefox has 5.0 GiB"
    assert memory._free(9 * gib, 32 * gib, 32 * gib, []).told == "9.0 GiB free of 32.0 GiB"


def test_swap_and_huge_pages() -> None:
    assert memory._swap(0, 0).told == "none"
    assert memory._swap(3 << 30, 4 << 30).status == "note"
    assert memory._huge_pages("always [madvise] never\n").status == "ok"
    never = memory._huge_pages("always madvise [never]\n")
    assert never.status == "note"
    assert "transparent_hugepage" in never.advice


def test_a_disk_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("/", "ext4"), (str(tmp_path), "nfs4")]
    assert folders.file_system(tmp_path / "model", mounts) == "nfs4"
    assert folders.file_system(Path("/elsewhere"), mounts) == "ext4"
    assert folders.file_system(tmp_path, []) == ""
    monkeypatch.setattr(folders, "file_system", lambda folder: "nfs4")
    check = folders.disk(tmp_path)
    assert (check.status, check.advice) == ("note", "copy the model to a disk of this one")


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    check = folders._kept()
    assert check.status == "note"
    assert "--state-folder" in check.advice
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders._kept().status == "ok"


GIB = 1 << 30


def plan(**changes: Any) -> Plan:
    """A plan for experts of 48 GiB, of which a quarter has slots; a token reads 2 GiB of weights."""
    told = {"device": "cpu", "layers": 32, "top_k": 8, "experts": 4096, "slots": 1024, "record_nbytes": 6 << 20}
    made = FakePlan()
    for name, value in (told | {"dense_nbytes": GIB // 2, "host_tier": "file", "predicted": None} | changes).items():
        object.__setattr__(made, name, value)
    return made


def test_how_much_of_a_model_fits() -> None:
    quarter = model._fit(plan(cache_nbytes=6 * GIB, direct_reads=True))
    told = "25% of the experts fit in the cache (6.0 GiB); the others are read from disk, past the page cache"
    assert (quarter.status, quarter.found) == ("note", f"{told}, which is too small for them")
    assert model._fit(plan(slots=4096)).status == "ok"
    assert model._fit(plan(host_tier="pinned")).found.endswith("the others are in pinned RAM")


@pytest.mark.parametrize(
    ("disk", "changes", "status", "begins"),
    [
        (1.0 * GIB, {}, "note", "the disk: a token reads 2.0 GiB of weights, 100.0 ms at 20.0 GiB/s of memory; "),
        (99.0 * GIB, {}, "ok", "memory: a token reads 2.0 GiB"),
        (None, {}, "note", "not known: a token reads 2.0 GiB"),
        (
            1.0 * GIB,
            {"slots": 4096},
            "ok",
            "memory: a token reads 2.0 GiB of weights, 100.0 ms at 20.0 GiB/s of memory",
        ),
        (1.0 * GIB, {"device": "cuda"}, "ok", "a token reads 2.0 GiB of weights; it waits for the link: up to 1.1 GiB"),
    ],
)
def test_what_a_token_waits_for(
    disk: float | None, changes: dict[str, Any], status: str, begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_memory_speed", lambda: 20.0 * GIB)
    check = model._bottleneck(plan(**changes), disk)
    assert check.status == status
    assert check.found.startswith(begins)


def test_what_a_profile_says() -> None:
    assert "edgemoe profile -m org/one" in model._speed("org/one", plan()).advice
    refused = PredictedSpeed("", 0, 0, 0, 0.7, "the profile of 2026-01-31 does not apply here")
    assert model._speed("m", plan(predicted=refused)).status == "note"
    told = model._speed("m", plan(predicted=PredictedSpeed("2026-01-31", 12.0, 15.0, 3, 0.7, "")))
    assert (told.status, told.found.split(",")[0]) == ("ok", "12.0 tokens/s")
