"""What this machine is, and what of edgemoe's requirements it has."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.device.layout import ROOT
from bench.device.section import Found, Target
from edgemoe.kernels.triton.availability import missing

UNDECLARED = ("triton", "pytest")
"""Not needed by edgemoe: triton comes with CUDA builds of torch, pytest with the extra `test`."""
IMPORTED = ("torch", "transformers", "numba", "greenlet")
"""Tried, since being there is not enough: numba refuses a numpy that is too new for it."""
WITHOUT = {
    "greenlet": "no engine loads, since edgemoe/experts/lockstep.py imports it: bring its wheel",
    "triton": "no kernels on a card, so experts are computed one after the other: it comes with CUDA builds of torch",
    "pytest": "the section with the tests is skipped, and no kind of attention is checked",
}


def measure(target: Target) -> Found:
    """Versions, what is missing, memory, cores, and the card."""
    versions = {name: _version(name) for name in (*requirements(), *UNDECLARED)}
    figures: dict[str, Any] = {
        "versions": {name: version for name, version in versions.items() if version},
        "missing": {name: WITHOUT.get(name, "") for name, version in versions.items() if not version},
        "broken": {name: said for name in IMPORTED if versions[name] and (said := _import_error(name))},
        "edgemoe": _import_error("edgemoe.cache") or _origin(),
        "cores": os.cpu_count(),
        **_memory(),
        "triton_kernels": missing() or "can be used",
        "compilers": _compilers(),
    }
    if target.cuda:
        figures |= _card()
    faults = [missing()] if target.cuda and missing() else []
    return Found(figures, faults)


def requirements() -> list[str]:
    """Names of the distributions that setup.cfg declares."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options"]["install_requires"].split("\n")
    return [re.split(r"[^\w.-]", line.strip())[0] for line in lines if line.strip()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _import_error(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:
        return repr(error)[:200]
    return ""


def _origin() -> str:
    found = Path(str(sys.modules["edgemoe.cache"].__file__))
    return "this checkout" if found.is_relative_to(ROOT) else "an installed one"


def _compilers() -> dict[str, str]:
    """The C compiler that Triton's launchers need and the ptxas that its kernels go through, by their versions."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    spec = importlib.util.find_spec("triton")
    own = sorted(Path(str(spec.origin)).parent.glob("backends/nvidia/bin/ptxas*")) if spec is not None else []
    assemblers = [os.environ.get("TRITON_PTXAS_PATH") or "", *map(str, own), shutil.which("ptxas") or ""]
    ptxas = next(filter(None, assemblers), "")
    return {"c": _says_version(compiler), "ptxas": _says_version(ptxas)}


def _says_version(program: str) -> str:
    """The path of `program` and its line that names a version; "none" for no program."""
    if not program:
        return "none"
    try:
        said = subprocess.run([*program.split(), "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}: {error!r}"[:200]
    lines = said.stdout.strip().splitlines() or [""]
    return f"{program}: {next((line for line in lines if 'release' in line), lines[0])}"


def _memory() -> dict[str, Any]:
    try:
        import psutil
    except ImportError:
        return {}
    memory = psutil.virtual_memory()
    return {"ram_total_GiB": memory.total >> 30, "ram_free_GiB": memory.available >> 30}


def _card() -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_properties(0)
    query = "pcie.link.gen.current,pcie.link.width.current,memory.used,driver_version"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = repr(error)[:100]
    return {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_GiB": card.total_memory >> 30,
        query: said,
    }
