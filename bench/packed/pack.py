"""`pack`: an 8 GB checkpoint to nf4, in one go and killed ten times."""

from __future__ import annotations

import hashlib
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.measurement import BaseSize, Measurement, work_folder
from bench.support.checkpoints import wide
from edgemoe.checkpoint.packed import packing

NAME = "pack"
BAR = "peak RSS <= 1.5 GB; <= 30 % of the input; killed at random moments and resumed, the identical files"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """How often the second packing is killed."""

    kills: int = 10


FULL, SMALL = Size(), Size(small=True, kills=1)


def run(size: Size = FULL) -> Measurement:
    """`edgemoe pack MODEL OUT --experts nf4 --dense nf4` in processes of its own."""
    source = wide(small=size.small)
    whole, again = (work_folder() / f"packed-{name}" for name in ("whole", "killed"))
    for folder in (whole, again):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(_command(source, whole), check=True, capture_output=True)
    seconds = time.perf_counter() - started
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024
    killed = _interrupted(_command(source, again), again, seconds, size.kills)
    same = _hashes(whole) == _hashes(again)
    share = _nbytes(whole) / _nbytes(source)
    for folder in (whole, again):
        shutil.rmtree(folder)
    value = {"peak_rss_gb": peak / 1e9, "share": share, "killed": killed, "identical": same}
    ok = same and share <= 0.3 and peak <= 1.5e9 and killed >= size.kills
    return Measurement(NAME, value, BAR, ok, {"seconds": seconds, "input_gb": _nbytes(source) / 1e9})


def _command(source: Path, out: Path) -> list[str]:
    run = "import sys; from edgemoe.cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", run, "pack", str(source), str(out), "--experts", "nf4", "--dense", "nf4"]


def _interrupted(command: list[str], out: Path, seconds: float, kills: int) -> int:
    """Starts the command until it ends by itself, killing it at random moments: how often it was killed."""
    generator, killed = random.Random(7), 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # The last attempt is left alone.
            patience = None if killed >= kills else generator.uniform(0.3, 1.0) * seconds / 2
            if process.wait(patience) != 0:
                raise RuntimeError(f"packing failed with status {process.returncode}")
            return killed
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if (out / packing.BEGUN).exists() or not out.exists():
                killed += 1


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
