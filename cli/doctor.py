"""`edgemoe doctor`: what this machine and its installation are fit for, and what to do about what is wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe import __version__
from edgemoe.cli.exits import Exit, why
from edgemoe.cli.loading import factory
from edgemoe.cli.output import put
from edgemoe.cli.render import columns, counted
from edgemoe.cli.surface import EngineFactory
from edgemoe.cli.wording import in_options
from edgemoe.errors import EdgeMoEError
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from edgemoe.plan.machine import Gpu

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_LITTLE_MEMORY = 2 << 30
_MAX_READS = 256 << 20
_MIN_READS = 32 << 20
_READ_PIECE = 8 << 20
_SLOW_READ = 200 << 20
"""Bytes a second below which a model that is read from disk while it runs is no pleasure."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: how it is, what was found, and what to do unless all is well."""

    name: str
    status: str
    found: str
    advice: str = ""


def doctor(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Print every check on standard output; the exit code is 1 when one is a problem."""
    checks = list(_checks(arguments.model, engine))
    if arguments.json:
        put(json.dumps({"checks": [asdict(check) for check in checks]}, indent=2) + "\n")
    elif sys.stdout.isatty():
        _print_table(checks)
    else:
        put(columns([(check.status, check.name, _told(check)) for check in checks]) + "\n")
    return Exit.FAILED if any(check.status == PROBLEM for check in checks) else Exit.OK


def _checks(model: str | None, engine: EngineFactory | None) -> Iterator[Check]:
    yield from _installation()
    yield _processor()
    yield from _from_torch()
    yield _model("demo model", None, engine)
    if model is not None:
        yield _model("model", model, engine)
        yield from _disk(model)


def _told(check: Check) -> str:
    return f"{check.found}; {check.advice}" if check.advice else check.found


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {OK: None, WARNING: "yellow", PROBLEM: "bold red"}
    table = Table("", "what", "found")
    for check in checks:
        table.add_row(check.status, check.name, _told(check), style=colours[check.status])
    Console(markup=False).print(table)


# --- the installation ----------------------------------------------------------------------------


def _installation() -> Iterator[Check]:
    """The packages that edgemoe's own metadata asks for."""
    yield Check("python", OK, platform.python_version())
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in importlib.metadata.requires("edgemoe") or []]
    except ImportError as error:  # a package without metadata is an ImportError, too
        yield Check("edgemoe", PROBLEM, f"not properly installed: {error}", "pip install edgemoe")
        return
    yield Check("edgemoe", OK, __version__)
    for package in wanted:
        if package.marker is None or package.marker.evaluate({"extra": ""}):
            yield _package(package)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(package: Requirement) -> Check:
    version = _version(package.name)
    if version is None:
        return Check(package.name, PROBLEM, "not installed", f"pip install '{package}'")
    if not package.specifier.contains(version, prereleases=True):
        return Check(package.name, PROBLEM, f"{version}, but {package.specifier} is needed", f"pip install '{package}'")
    return Check(package.name, OK, version)


# --- the machine ---------------------------------------------------------------------------------


def _processor() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("processor", OK, f"{counted(os.cpu_count() or 1, 'core')}, {usable} for this process")


def _from_torch() -> Iterator[Check]:
    """The checks that import torch, as memory and devices do."""
    try:
        import torch

        from edgemoe.cache import accelerator
        from edgemoe.plan import machine
    except (ImportError, OSError, RuntimeError) as error:
        yield Check("torch import", PROBLEM, f"failed: {error}", "install torch again for this machine")
        return
    yield Check("threads", OK, f"torch computes with {counted(torch.get_num_threads(), 'thread')}")
    free, limit = machine.ram_free(), machine.ram_limit()
    found = f"{format_bytes(free)} free of {format_bytes(limit)}"
    few = free < _LITTLE_MEMORY
    yield Check("memory", WARNING if few else OK, found, "close other programs before loading a model" if few else "")
    gpus = machine.gpus()
    for gpu in gpus:
        yield Check(f"gpu {gpu.index}", OK, _gpu(gpu))
    usable = accelerator.available()
    if gpus and not usable:
        yield Check("cuda", WARNING, "this torch cannot use the GPU", "install a CUDA build of torch from pytorch.org")
    elif not gpus:
        yield Check("gpu", OK, "none; the CPU computes, with the experts on disk and the cache in memory")
    yield _pinning() if usable else Check("pinned memory", OK, "not needed without a GPU")
    yield _triton() if usable else Check("triton", OK, "not needed without a GPU")
    yield _compiled_code()


def _gpu(gpu: Gpu) -> str:
    from edgemoe.cache.accelerator import MIN_BF16_CAPABILITY

    told = [gpu.name, f"{format_bytes(gpu.free)} free of {format_bytes(gpu.total)}"]
    if gpu.capability is not None:
        told.append(f"compute capability {_dotted(gpu.capability)}")
        if gpu.capability < MIN_BF16_CAPABILITY:
            told.append(f"below {_dotted(MIN_BF16_CAPABILITY)}: checkpoints in bfloat16 run in float16")
    return ", ".join(told)


def _dotted(capability: tuple[int, int]) -> str:
    major, minor = capability
    return f"{major}.{minor}"


def _triton() -> Check:
    """Whether experts are computed by the GPU's own kernels."""
    from edgemoe.kernels.triton.availability import missing

    why = missing()
    if why:
        return Check("triton", WARNING, why, "passes on the GPU will be slower")
    return Check("triton", OK, "its kernels can be used")


def _compiled_code() -> Check:
    from edgemoe.cache.compiled import is_kept

    if is_kept():
        return Check("compiled code", OK, "kept on disk for the next start")
    advice = "set NUMBA_CACHE_DIR to a folder that can be written"
    return Check("compiled code", WARNING, "cannot be kept, so that every start compiles for some seconds", advice)


def _pinning() -> Check:
    import torch

    try:
        pinned = torch.empty(_READ_PIECE, dtype=torch.uint8, pin_memory=True).is_pinned()
    except RuntimeError as error:
        return Check("pinned memory", WARNING, f"refused: {error}", "transfers to the GPU will be slower")
    if not pinned:
        return Check("pinned memory", WARNING, "not given", "transfers to the GPU will be slower")
    return Check("pinned memory", OK, "works")


# --- the model -----------------------------------------------------------------------------------


def _model(name: str, model: str | None, engine: EngineFactory | None) -> Check:
    try:
        plan = factory(engine).plan_for(model)
    except EdgeMoEError as error:
        return Check(name, PROBLEM, in_options(str(error)))  # which names the mend itself
    except (ImportError, OSError) as error:
        return Check(name, PROBLEM, f"cannot be looked at: {error}", "mend the problems above first")
    why = f": {in_options(plan.dtype_note)}" if plan.dtype_note else ""
    return Check(name, OK, f"{plan.model} can run on {plan.device} in {plan.dtype}{why}")


def _disk(model: str) -> Iterator[Check]:
    folder = Path(model)
    if not folder.is_dir():
        yield Check("disk", OK, f"{model} is no folder on this machine, so its disk is not measured")
        return
    yield Check("disk", OK, f"{format_bytes(shutil.disk_usage(folder).free)} free")
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    if files:
        yield _read_speed(files[-1])


def _read_speed(file: Path, clock: Callable[[], float] = time.perf_counter) -> Check:
    """Read the beginning of a file, past the system's file cache where the system can be asked to empty it."""
    done = 0
    try:
        with file.open("rb", buffering=0) as raw:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = clock()
            while done < _MAX_READS and (piece := raw.read(_READ_PIECE)):
                done += len(piece)
            rate = done / max(clock() - begun, 1e-9)
    except OSError as error:
        return Check("disk read", PROBLEM, f"{file.name}: {why(error)}", "copy the model to a sound disk")
    found = f"{format_bytes(rate)} a second"
    if done < _MIN_READS:
        return Check("disk read", OK, f"{file.name} is too small to measure")
    if rate < _SLOW_READ:
        return Check("disk read", WARNING, found, "a model that does not fit in memory will be slow; use a faster disk")
    return Check("disk read", OK, found)
