"""`larger-than-memory`: an 8 GB checkpoint decoded within 4 GB, cold, against transformers + accelerate."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measurement import CHECKOUT, BaseSize, Measurement, work_folder
from bench.support.cgroup import MemoryGroup
from bench.support.checkpoints import wide
from bench.support.engine_parts import cache_of, link_of, runner_of
from bench.support.waits import WaitRecorder
from edgemoe.config import EngineConfig

NAME = "larger-than-memory"
BAR = ">= 1.15x the peer's tokens/s, and >= 80 % of the disk's bandwidth while loads are waited for"
LIMIT = 4_000_000_000
PROMPT = 16


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Rounds, decoded tokens of each, and what the disk is measured with, in bytes."""

    cache: str | int = EngineConfig.expert_cache
    rounds: int = 2
    steps: int = 32
    piece: int = 2 << 20
    disk_sample: int = 1 << 30


FULL, SMALL = Size(), Size(small=True, cache="25%", rounds=1, steps=2, piece=64 << 10, disk_sample=1 << 20)


def run(size: Size = FULL) -> Measurement:
    """Alternating processes under the same cap; medians. Needs root for the control group."""
    if not MemoryGroup.available():
        return Measurement(NAME, None, BAR, None, {"why": "a memory control group needs root and a writable hierarchy"})
    folder = wide(small=size.small)
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": [], "disk": []}
    with MemoryGroup("edgemoe-bench", LIMIT) as group:
        for _ in range(size.rounds):
            for role in found:
                forget_pages(folder)
                done = group.run(
                    ["bench.cache.larger_than_memory", role, str(folder), *["small"] * size.small], CHECKOUT
                )
                if done.returncode != 0:
                    return Measurement(NAME, None, BAR, False, {"failed": role, "error": done.stderr[-2000:]})
                found[role].append(json.loads(done.stdout.splitlines()[-1]))
    ours, peer, disk = (statistics.median(item["value"] for item in found[role]) for role in ("ours", "peer", "disk"))
    reached = statistics.median(item["link"] for item in found["ours"])
    value = {"speedup": round(ours / peer, 3), "of_disk": round(reached / disk, 3)}
    return Measurement(NAME, value, BAR, ours / peer >= 1.15 and reached / disk >= 0.8, found | {"cache": "cold"})


def forget_pages(place: Path) -> None:
    """Drops the page cache of the file `place`, or of every file in that folder: the next reader finds it cold."""
    os.sync()
    for file in [place] if place.is_file() else place.rglob("*.*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def random_tokens(count: int) -> list[int]:
    """The same tokens for both contenders: random ones, so that routing is spread."""
    rng = random.Random(0)
    return [rng.randrange(3, 32000) for _ in range(count)]


def ours(folder: Path, size: Size) -> dict[str, Any]:
    """Tokens/s of edgemoe, and the bandwidth that its link reached while something was on it."""
    from edgemoe import Engine

    tokens = random_tokens(PROMPT + size.steps)
    with Engine.load(folder, device="cpu", expert_cache=size.cache, context=256) as engine:
        runner, experts, link = runner_of(engine), cache_of(engine), link_of(engine)
        cache = runner.start(len(tokens))
        runner.step(cache, tokens[:PROMPT])
        before, busy, moved = experts.counters.copy(), link.busy_seconds, link.bytes_moved
        recorder = WaitRecorder(experts.store, link)
        started = time.perf_counter()
        for token in tokens[PROMPT:]:
            runner.step(cache, [token])
        seconds = time.perf_counter() - started
        counters = experts.counters
        loaded = counters.bytes_loaded - before.bytes_loaded
        return {
            "value": size.steps / seconds,
            "link": recorder.waited_bandwidth(),
            "link_while_computing_too": (link.bytes_moved - moved) / (link.busy_seconds - busy),
            "bytes_per_token": loaded / size.steps,
            "hit_rate": (counters.hits - before.hits) / (counters.hits + counters.misses - before.hits - before.misses),
            "wait_share": (counters.link_wait_seconds - before.link_wait_seconds) / seconds,
            "slots": engine.plan.slots,
        }


def peer(folder: Path, size: Size) -> dict[str, Any]:
    """Tokens/s of transformers with its experts offloaded to disk by accelerate."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    offload = work_folder() / "offload"
    shutil.rmtree(offload, ignore_errors=True)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    places: dict[str, str] = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    for layer in range(layers):
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            places[f"model.layers.{layer}.{part}"] = "cpu"
        places[f"model.layers.{layer}.mlp.experts"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=places, offload_folder=str(offload)
    ).eval()
    forget_pages(offload)
    tokens = random_tokens(PROMPT + size.steps)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([tokens[:PROMPT]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        started = time.perf_counter()
        for token in tokens[PROMPT:]:
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        seconds = time.perf_counter() - started
    shutil.rmtree(offload, ignore_errors=True)
    return {"value": size.steps / seconds}


def disk(place: Path, size: Size) -> dict[str, Any]:
    """The disk's bandwidth for random pieces of the file, or of a checkpoint's, with several reads in flight.

    In bytes a second: the best of four ways.
    """
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size - size.piece, size.piece)]
    best: dict[str, float] = {}
    for threads in (4, 8):
        for flag, way in ((0, "buffered"), (os.O_DIRECT, "direct")):
            forget_pages(place)
            chosen = random.Random(threads).sample(pieces, size.disk_sample // size.piece)
            # Some file systems, those in memory above all, know no direct reads.
            with suppress(OSError):
                best[f"{way} x{threads}"] = _bandwidth(files, chosen, flag, threads, size.piece)
    return {"value": max(best.values()), "ways": best}


def _bandwidth(files: list[Path], chosen: list[tuple[Path, int]], flag: int, threads: int, nbytes: int) -> float:
    """Bytes a second of reads of `nbytes` at the `chosen` places by so many threads."""
    with ExitStack() as stack:
        handles = {}
        for file in files:
            handles[file] = os.open(file, os.O_RDONLY | flag)
            stack.callback(os.close, handles[file])
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            total = sum(pool.map(lambda piece: _read(handles[piece[0]], piece[1], nbytes), chosen))
        return total / (time.perf_counter() - started)


def _read(handle: int, start: int, nbytes: int) -> int:
    with mmap.mmap(-1, nbytes) as buffer:
        return os.preadv(handle, [buffer], start)


if __name__ == "__main__":
    roles = {"ours": ours, "peer": peer, "disk": disk}
    print(json.dumps(roles[sys.argv[1]](Path(sys.argv[2]), SMALL if "small" in sys.argv[3:] else FULL)))
