"""The run on a card: dry-run on the CPU from a bare checkout, its boxes, its budget and its verdict."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench.device import device, environment
from bench.device.census import counts
from bench.device.processes import in_processes
from bench.device.runner import Outcome, run_sections
from bench.device.section import Found, OnCpu, Section, SkippedError, Target
from bench.device.wide.figures import Fixed, against_floor
from bench.device.wide.section import Measured, _verdict
from bench.measurement import Measurement
from edgemoe.plan.profile import CardSpeed
from tests.support import ROOT

HIDE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
"""
"""A sitecustomize that takes an editable install's finder away, as on a machine where nothing was installed."""
PARTS = ("bench", "cache", "cli", "edgemoe", "prefetch", "tests", "pyproject.toml", "setup.cfg")
NEED_TRITON = {"zero-copy", "graphs", "kernel-checks", "kernel-speed"}


@dataclass
class DryRun:
    """What `python -m bench device --small` left behind."""

    checkout: Path
    last: dict[str, Any]
    said: str
    sections: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    folder = tmp_path_factory.mktemp("device")
    checkout, out, hiding = folder / "checkout", folder / "out", folder / "hiding"
    for each in (checkout, out, hiding):
        each.mkdir()
    for part in PARTS:
        (checkout / part).symlink_to(ROOT / part)
    (hiding / "sitecustomize.py").write_text(HIDE)
    paths = os.pathsep.join([str(hiding), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "bench", "device", "--small"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": paths, "OUT": str(out), "EDGEMOE_BENCH_DIR": str(folder / "bench")},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return DryRun(
        checkout,
        json.loads(done.stdout.splitlines()[-1]),
        done.stdout,
        json.loads((out / "device.json").read_text("utf-8")),
    )


@pytest.mark.slow
def test_every_section_that_needs_no_card_runs_from_a_bare_checkout(dry_run: DryRun) -> None:
    assert dry_run.last["value"]["failed"] == {}, dry_run.said
    assert dry_run.last["value"]["faults"] == []
    assert list(dry_run.sections) == [section.name for section in device.SECTIONS]
    for section in device.SECTIONS:
        found = dry_run.sections[section.name]
        if section.on_cpu is OnCpu.NEVER:
            assert found == {"skipped": "needs a card"}
        elif section.name in NEED_TRITON and found.get("skipped"):
            assert "Triton is not installed" in found["skipped"]
        else:
            assert found["figures"], section.name


@pytest.mark.slow
def test_a_bare_checkout_uses_its_own_folders(dry_run: DryRun) -> None:
    assert dry_run.sections["environment"]["figures"]["edgemoe"] == "this checkout"


@pytest.mark.slow
def test_a_dry_run_gives_no_verdict_and_says_why(dry_run: DryRun) -> None:
    assert dry_run.last["name"] == "device"
    assert dry_run.last["ok"] is None
    assert dry_run.last["detail"]["why"] == "a dry run on the CPU"


@pytest.mark.slow
def test_a_line_is_printed_for_each_section(dry_run: DryRun) -> None:
    lines = [line.split()[0] for line in dry_run.said.splitlines()[:-1]]
    assert lines == [section.name for section in device.SECTIONS]


def test_sub_packages_are_folders_of_the_same_name() -> None:
    """Which is how `lay_out` finds them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    folders = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    assert folders.pop("edgemoe") == "edgemoe"
    assert {f"edgemoe.{folder}": folder for folder in folders.values()} == folders


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: "" if name == "greenlet" else version(name))
    missing = environment.measure(target()).figures["missing"]
    assert "lockstep.py" in missing["greenlet"]
    assert "torch" not in missing


# --- the runner ----------------------------------------------------------------------------------


def target(name: str = "cpu", *, small: bool = True, seconds: float = 480.0) -> Target:
    return Target(name, small, time.perf_counter() + seconds)


@pytest.fixture
def section(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Section]:
    """Makes a section out of a function."""

    def make(name: str, measure: Callable[[Target], Found], seconds: float = 1.0, **more: Any) -> Section:
        module = ModuleType(f"section_{name}")
        vars(module)["measure"] = measure
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Section(name, module.__name__, seconds, **more)

    return make


def fine(_: Target) -> Found:
    return Found({"answer": 42})


def wrong(_: Target) -> Found:
    return Found({"answer": 41}, ["one too few"])


def broken(_: Target) -> Found:
    raise RuntimeError("CUDA error: unspecified launch failure")


def unable(_: Target) -> Found:
    raise SkippedError("there is no such thing here")


def run_all(sections: list[Section], where: Target) -> dict[str, Outcome]:
    return run_sections(sections, where, lambda so_far: None)


def test_a_section_that_fails_is_printed_and_the_next_one_runs(
    section: Callable[..., Section], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = run_all(
        [section("broken", broken), Section("gone", "no.such.module", 1), section("fine", fine)], target()
    )
    assert "unspecified launch failure" in outcomes["broken"].failed
    assert "ModuleNotFoundError" in outcomes["gone"].failed
    assert outcomes["fine"].figures == {"answer": 42}
    printed = capsys.readouterr().out
    assert "in broken\n    raise RuntimeError" in printed
    assert "FAILED: RuntimeError" in printed


def test_a_section_that_is_not_done_in_time_is_skipped(section: Callable[..., Section]) -> None:
    sections = [section("long", fine, 100), section("short", fine, 10)]
    outcomes = run_all(sections, target("cuda:0", small=False, seconds=50))
    assert outcomes["long"].skipped == "takes up to 100 s, 50 s are left"
    assert outcomes["short"].figures


def test_all_sections_fit_into_the_budget() -> None:
    assert sum(each.seconds for each in device.SECTIONS) <= device.FULL.budget <= 8 * 60


@pytest.mark.parametrize(
    ("on_cpu", "runs"),
    [(OnCpu.ALWAYS, [True, True, True]), (OnCpu.SMALL, [True, False, True]), (OnCpu.NEVER, [False, False, True])],
)
def test_where_a_section_runs(on_cpu: OnCpu, runs: list[bool], section: Callable[..., Section]) -> None:
    places = [target("cpu", small=True), target("cpu", small=False), target("cuda:0", small=False)]
    each = section("each", fine, on_cpu=on_cpu)
    assert [not run_all([each], place)["each"].skipped for place in places] == runs


def test_figures_are_kept_after_each_section(section: Callable[..., Section]) -> None:
    kept: list[list[str]] = []
    sections = [section("fine", fine), section("unable", unable)]
    run_sections(sections, target(), lambda so_far: kept.append(list(so_far)))
    assert kept == [["fine"], ["fine", "unable"]]


@pytest.mark.parametrize(
    ("measures", "ok"),
    [([fine, fine], True), ([fine, wrong], False), ([fine, broken], False), ([fine, unable], None)],
)
def test_the_verdict_on_a_card(
    measures: list[Callable[[Target], Found]],
    ok: bool | None,
    section: Callable[..., Section],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    measurement = run_with([section(f"s{at}", each) for at, each in enumerate(measures)], "cuda:0", monkeypatch)
    assert measurement.ok is ok
    assert (ok is None) == ("why" in measurement.detail)
    assert json.loads((tmp_path / "device.json").read_text("utf-8"))["s0"]["figures"] == {"answer": 42}


def test_without_a_card_nothing_is_judged(
    section: Callable[..., Section], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    measurement = run_with([section("fine", fine)], "cpu", monkeypatch)
    assert measurement.ok is None
    assert measurement.detail["why"] == "torch finds no CUDA device"
    assert measurement.detail["skipped"] == {"fine": "needs a card"}


def run_with(sections: list[Section], where: str, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    monkeypatch.setattr(device, "SECTIONS", sections)
    monkeypatch.setattr(device, "_device", lambda: where)
    return device.run()


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.device.triton_kernels import gather
signature = {"addresses": "*i64", "records": "*i64", "sources": "*i32", "slots": "*i32"}
constants = {"words": 9 << 17, "block": 1024, "programs": 8}
source = ASTSource(fn=gather, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
for capability in map(int, sys.argv[1:]):
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
    print(capability)
"""


def test_kernels_compile_for_cards() -> None:
    """In a process without Triton's interpreter, which accepts what its compiler refuses."""
    pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, "75", "80", "90"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["75", "80", "90"], done.stderr


# --- tasks in processes --------------------------------------------------------------------------


TASKS = """
import os, time

def found(task, device, small):
    if task == "raises":
        raise ValueError(f"no {device}")
    if task == "dies":
        os._exit(9)
    if task == "late":
        time.sleep(600)
    return {"task": task, "small": small}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that processes find."""
    (tmp_path / "tasks_of_a_test.py").write_text(TASKS)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return "tasks_of_a_test"


@pytest.mark.slow
def test_a_task_that_fails_spares_those_after_it(tasks: str) -> None:
    found = in_processes(tasks, target(), ["raises", "dies", "fine"], 1, 300)
    assert list(found) == ["raises", "dies", "fine"]
    assert found["raises"] == {"error": "ValueError('no cpu')"}
    assert "the process ended" in found["dies"]["error"]
    assert found["fine"] == {"task": "fine", "small": True}


@pytest.mark.slow
def test_tasks_that_are_not_done_in_time_are_left_out(tasks: str) -> None:
    began = time.perf_counter()
    assert "late" not in in_processes(tasks, target(), ["fine", "late", "fine too"], 1, 10)
    assert time.perf_counter() - began < 120


# --- figures -------------------------------------------------------------------------------------


def event(name: str, device: str, microseconds: float = 0.0) -> Any:
    return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), device_time=microseconds)


def test_kernels_in_graphs_are_those_that_were_not_launched() -> None:
    events = [
        event("aten::mm", "CPU"), event("cudaLaunchKernel", "CPU"), event("cuLaunchKernelEx", "CPU"),
        event("cudaGraphLaunch", "CPU"), event("cudaMemcpyAsync", "CPU"), event("Memcpy HtoD", "CUDA", 9.0),
        event("Memset (Device)", "CUDA", 9.0), event("_up", "CUDA", 5.0), event("_down", "CUDA", 3.0),
        event("gemv", "CUDA", 2.0), event("softmax", "CUDA", 1.0), event("rms_norm", "CUDA", 1.0),
    ]  # fmt: skip
    found = counts(events)
    assert (found["launches"], found["graph_replays"], found["copies"]) == (2, 1, 1)
    assert (found["kernels"], found["kernels_in_graphs"]) == (5, 3)
    assert (found["kernel_us"], found["expert_kernel_us"]) == (12.0, 8.0)


def test_a_step_is_held_against_what_has_to_be_moved() -> None:
    """Two layers of 4 of 10 MB experts, half of which are missing; the link has 20 GB/s, the memory 400 GB/s."""
    plan: Any = SimpleNamespace(layers=2, top_k=4, record_nbytes=10_000_000, dense_nbytes=600)
    short: Any = SimpleNamespace(layers=1, dense_nbytes=350)
    fixed = Fixed.between(short, 0.005, plan, 0.007)
    assert fixed.seconds == pytest.approx(0.003)
    assert fixed.layer_nbytes == 250
    speed = CardSpeed(20e9, 15e9, 400e9, 0.0, 0.0, 12e9, 10e9)
    row = {"ms_a_step": 7.0, "hit_rate": 0.5, "link_GBps": 18.0}
    found = against_floor(row, plan, speed, fixed)
    assert found["ms_a_layer"] == 2.0
    assert found["ms_of_48_layers"] == 99.0
    assert found["floor_ms_a_layer"] == {"link": 1.0, "link and CPU": 0.8, "vram": 0.1}
    assert (found["of_floor"], found["link_of_pinned"]) == (2.0, 0.9)


def test_the_verdict_on_layers_of_a_large_model() -> None:
    fine_step = {"reads_a_layer": 1.0, "hidden_waits_a_layer": 0.5}
    plain: dict[str, Any] = {"ms_a_step": 10.0, "MB_a_step": 50.0, "link_of_pinned": 0.9}
    rows: dict[str, dict[str, Any]]
    rows = {"int4, 12 GiB": {"ms_a_step": 10.4, "step": fine_step}, "int4, 12 GiB, prefetch off": plain}
    assert _verdict(Measured(rows)) == []
    rows = {
        "int4, 12 GiB": {"ms_a_step": 10.6, "step": {**fine_step, "reads_a_layer": 1.5}},
        "int4, 12 GiB, prefetch off": {**plain, "link_of_pinned": 0.8},
    }
    waits, prefetch, link = _verdict(Measured(rows))
    assert "1.5 times" in waits
    assert "10.6 ms a step, 10.0 without prefetches" in prefetch
    assert "80%" in link
