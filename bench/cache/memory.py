"""`memory`: an 8 GB checkpoint with a 1 GiB expert cache: peak memory of the process, page cache apart."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.measurement import CHECKOUT, BaseSize, Measurement
from bench.support.checkpoints import wide

NAME = "memory"
BAR = "<= non-expert weights + 1 GiB + 400 MiB"
CACHE = "1GiB"
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Tokens of the prompt and of the reply."""

    prompt: int = 512
    tokens: int = 32


FULL, SMALL = Size(), Size(small=True, prompt=16, tokens=4)


def run(size: Size = FULL) -> Measurement:
    """Runs a long prompt and a reply in a process of its own, and watches its anonymous memory."""
    folder = wide(small=size.small)
    command = [sys.executable, "-m", "bench.cache.memory", str(folder), str(size.prompt), str(size.tokens)]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    peak = whole = 0
    while process.poll() is None:
        sizes = _sizes(status)
        peak = max(peak, sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
        whole = max(whole, sizes.get("VmHWM", 0))
        time.sleep(0.005)
    assert process.stdout is not None
    if process.returncode != 0:
        return Measurement(NAME, None, BAR, False, {"failed": process.returncode})
    dense = json.loads(process.stdout.read().splitlines()[-1])["dense_nbytes"]
    allowed = dense + (1 << 30) + 400 * MIB
    value = {"peak_mib": round(peak / MIB), "over_weights_and_cache_mib": round((peak - dense - (1 << 30)) / MIB)}
    detail = {
        "allowed_mib": round(allowed / MIB),
        "dense_mib": round(dense / MIB),
        "with_file_pages_mib": round(whole / MIB),
    }
    return Measurement(NAME, value, BAR, peak <= allowed, detail)


def _sizes(status: Path) -> dict[str, int]:
    """The memory lines of a process's status, in bytes; empty once it is gone."""
    try:
        lines = [line.split() for line in status.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def work(folder: Path, prompt: int, tokens: int) -> None:
    """A prompt of so many tokens and so many of reply."""
    from edgemoe import Engine, Sampling

    with Engine.load(folder, device="cpu", expert_cache=CACHE) as engine:
        engine.generate(
            [3 + 7 * index % 30000 for index in range(prompt)], Sampling(max_tokens=tokens, ignore_eos=True)
        )
        print(json.dumps(engine.plan.to_dict()))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
