"""Downloads that fetched too much, and caches that were not found."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.field.case import Case, edgemoe, edit, holds, same, sound
from bench.support.loopback_hub import COMMIT, REPOSITORY, Hub
from bench.support.zoo import make


@contextmanager
def _hub(folder: Path) -> Iterator[Hub]:
    make("mixtral", folder / "repository", max_shard_size="300KB")
    hub = Hub(folder / "repository")
    try:
        yield hub
    finally:
        hub.close()


def _plan(folder: Path, hub: Hub, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return edgemoe(["plan", "-m", REPOSITORY, "--device", "cpu", *more], **hub.environment(folder / "hf") | variables)


def _cache(folder: Path) -> Path:
    """The repository's folder in the cache."""
    return folder / "hf" / "hub" / f"models--{REPOSITORY.replace('/', '--')}"


def _copies(folder: Path) -> str:
    with _hub(folder) as hub:
        (hub.folder / "original").mkdir()
        for copy in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
            shutil.copy(next(hub.folder.glob("model-*.safetensors")), hub.folder / copy)
        done = _plan(folder, hub)
        shards = {file.name for file in hub.folder.glob("model-*.safetensors")}
        fetched = {name for name in hub.fetched if name.endswith((".safetensors", ".bin"))}
        return sound(done) or same(fetched, shards) or same(len(hub.fetched), len(set(hub.fetched)))


def _refused_by_its_configuration(folder: Path) -> str:
    with _hub(folder) as hub:
        edit(hub.folder / "config.json", quantization_config={"quant_method": "nosuch"})
        done = _plan(folder, hub)
        return sound(done, 3) or holds(done.stderr, "nosuch") or same(hub.fetched, ["config.json"])


def _offline_by_commit(folder: Path) -> str:
    """A cache that was copied, or filled by commit: the reference to the branch is missing."""
    with _hub(folder) as hub:
        _plan(folder, hub)
        shutil.rmtree(_cache(folder) / "refs")
        done = _plan(folder, hub, HF_HUB_OFFLINE="1")
        return sound(done)


def _line_break_in_the_reference(folder: Path) -> str:
    with _hub(folder) as hub:
        _plan(folder, hub)
        reference = _cache(folder) / "refs" / "main"
        reference.write_text(f"{COMMIT}\n")
        return sound(_plan(folder, hub, HF_HUB_OFFLINE="1"))


def _cache_that_cannot_be_written(folder: Path) -> str:
    with _hub(folder) as hub:
        _plan(folder, hub)
        home = folder / "hf"
        lock = f"mount --bind {home} {home} && mount -o remount,ro,bind {home} && "
        for offline in ("0", "1"):
            variables = hub.environment(home) | {"HF_HUB_OFFLINE": offline}
            done = edgemoe(["plan", "-m", REPOSITORY, "--device", "cpu"], before=lock, **variables)
            if said := sound(done):
                return f"offline {offline}: {said}"
        return ""


def _half_of_the_shards(folder: Path) -> str:
    with _hub(folder) as hub:
        _plan(folder, hub)
        lost = sorted((_cache(folder) / "snapshots" / COMMIT).glob("model-*.safetensors"))[0]
        lost.unlink()
        done = _plan(folder, hub, HF_HUB_OFFLINE="1")
        return sound(done, 3) or holds(done.stderr, lost.name)


def _interrupted(folder: Path) -> str:
    """A file that was fetched by half before is fetched whole, and nothing else again."""
    with _hub(folder) as hub:
        _plan(folder, hub)
        snapshot = _cache(folder) / "snapshots" / COMMIT
        shard = sorted(snapshot.glob("model-*.safetensors"))[0]
        blob = shard.resolve()
        half = blob.read_bytes()[: blob.stat().st_size // 2]
        shard.unlink()
        blob.unlink()
        blob.with_name(blob.name + ".incomplete").write_bytes(half)
        hub.fetched.clear()
        done = _plan(folder, hub)
        return sound(done) or same(hub.fetched, [shard.name])


CASES = [
    Case(
        "unslothai/unsloth#11227, exo-explore/exo#1800, FlashML-org/FreeToken#336", "one copy of the weights", _copies
    ),
    Case("exo-explore/exo#1800", "refused by its configuration alone", _refused_by_its_configuration),
    Case("huggingface/huggingface_hub#4492", "offline, without a reference to the branch", _offline_by_commit),
    Case(
        "MiaAI-Lab/Qwen3.8-Flash-Next-Dual-DGX-Sparks#36", "a line break in the reference", _line_break_in_the_reference
    ),
    Case("huggingface/huggingface_hub#2797", "a cache that cannot be written", _cache_that_cannot_be_written),
    Case("huggingface/huggingface_hub#4624", "half of the shards in the cache", _half_of_the_shards),
    Case("huggingface/huggingface_hub#1396", "a download that was cut off", _interrupted),
]
