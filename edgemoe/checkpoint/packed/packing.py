"""Writes a checkpoint with quantised weights, a file at a time: what was begun can be gone on with."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgemoe.cache.record import host_bytes
from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.checkpoint import INDEX
from edgemoe.checkpoint.dense_loader import LazyTensor
from edgemoe.checkpoint.foreign.safetensors_table import DTYPES
from edgemoe.checkpoint.packed.packed_names import StoredTensor, description, quantization_config, stored_tensors
from edgemoe.checkpoint.packed.packing_choice import Chosen, chosen_weights
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.errors import CheckpointError, PlanError, reading
from edgemoe.sizes import format_bytes

SHARD_NBYTES = 1 << 30
"""Bytes at which a file is full: as much is done again, at most, after an interruption."""
CHUNK_NBYTES = 16 << 20
"""Bytes that are read or hashed at a time."""
BEGUN = "edgemoe-pack.json"
"""The file that says what was begun, and which files are whole; it is there until the checkpoint is."""
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*")
"""Files beside the weights that are copied: tokenizer, template, generation settings."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

OnProgress = Callable[[int, int], None]
"""Called with the bytes of the source that are done, and all of them."""


@dataclass(frozen=True)
class _Job:
    """One weight of the source, and what it becomes."""

    key: str
    entry: TensorEntry
    chosen: Chosen | None
    """None for a weight that is copied."""
    tensors: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(each) for each in self.tensors)


def pack(blueprint: Blueprint, out: Path, on_progress: OnProgress | None = None) -> bool:
    """Writes the checkpoint of `blueprint`, quantised to its formats, to the folder `out`; goes on where it was begun.

    The blueprint says what is quantised (`made_experts`, `made_dense`). At most a file's largest weight is in memory.
    Returns whether there was anything to do. Raises CheckpointError if the weights cannot be packed or `out` has
    something else in it, and PlanError if the disk is too small.
    """
    source = blueprint.checkpoint
    chosen = chosen_weights(blueprint)
    jobs = [_job(key, entry, chosen.get(key)) for key, entry in source.tensors.items()]
    jobs.sort(key=lambda job: (job.entry.file, job.entry.offset))
    shards = _shards(jobs)
    out.mkdir(parents=True, exist_ok=True)
    begun = _Begun(out, _identity(blueprint, shards))
    if begun.complete:
        return False
    _check_room(out, sum(job.nbytes for job in jobs), begun)
    total, done = sum(job.entry.nbytes for job in jobs), 0
    with reading(source.name):
        for number, shard in enumerate(shards):
            name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            if name not in begun.checksums:
                begun.finish(name, _write(out / name, shard, source.files))
            done += sum(job.entry.nbytes for job in shard)
            if on_progress is not None:
                on_progress(done, total)
    _write_rest(blueprint, out, chosen, shards, begun)
    return True


def verify(out: Path, on_progress: OnProgress | None = None) -> list[str]:
    """The names of the weight files in `out` that are not as they were written, by the checksums in its index.

    Raises CheckpointError if `out` has no such index.
    """
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        checksums: Mapping[str, str] = index["metadata"]["sha256"]
        sizes = {name: (out / name).stat().st_size if (out / name).exists() else 0 for name in checksums}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{out} has no index with checksums, as 'edgemoe pack' writes: pack it again") from error
    wrong, done, total = [], 0, sum(sizes.values())
    for name, expected in checksums.items():
        if not (out / name).exists() or _sha256(out / name) != expected:
            wrong.append(name)
        done += sizes[name]
        if on_progress is not None:
            on_progress(done, total)
    return wrong


class _Begun:
    """The record of a packing that goes on: which files are whole. Kept in the folder until all are."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self._path = out / BEGUN
        self.identity = dict(identity)
        """What decides every byte of the result."""
        self.checksums: dict[str, str] = {}
        """The SHA-256 of each file that is whole."""
        self.complete = False
        if self._path.exists():
            self._go_on(out)
        elif any(file != _beside(self._path) for file in out.iterdir()):
            self._check_complete(out)
        else:
            self._keep()

    def _go_on(self, out: Path) -> None:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            same = kept["identity"] == self.identity
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise CheckpointError(f"{out} was begun from another checkpoint or format: give another folder")
        self.checksums = {name: own for name, own in kept["sha256"].items() if (out / name).exists()}

    def _check_complete(self, out: Path) -> None:
        try:
            kept = json.loads((out / INDEX).read_text(encoding="utf-8"))["metadata"]["source"]
        except (OSError, ValueError, KeyError, TypeError):
            kept = None
        if kept != self.identity:
            raise CheckpointError(f"{out} is not empty, and was not packed from this checkpoint: give another folder")
        self.complete = True

    def finish(self, name: str, checksum: str) -> None:
        """Keeps that the file `name` is whole."""
        self.checksums[name] = checksum
        self._keep()

    def remove(self) -> None:
        """The checkpoint is whole."""
        self._path.unlink()

    def _keep(self) -> None:
        _write_json(self._path, {"identity": self.identity, "sha256": self.checksums})


def _job(key: str, entry: TensorEntry, chosen: Chosen | None) -> _Job:
    if chosen is None:
        return _Job(key, entry, None, (StoredTensor(key, entry.shape, entry.dtype, ""),))
    tensors = stored_tensors(key, chosen.format, chosen.rows, chosen.columns, chosen.experts)
    return _Job(key, entry, chosen, tuple(tensors))


def _shards(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """The weights of each file, in their order in the source's."""
    shards: list[list[_Job]] = [[]]
    held = 0
    for job in jobs:
        if held and held + job.nbytes > SHARD_NBYTES:
            shards.append([])
            held = 0
        shards[-1].append(job)
        held += job.nbytes
    return shards


def _identity(blueprint: Blueprint, shards: Sequence[Sequence[_Job]]) -> dict[str, Any]:
    """What decides every byte of the result: the source, the formats, and which weights are in which file."""
    layout = [[(job.key, job.entry.nbytes, str(job.chosen and job.chosen.format)) for job in shard] for shard in shards]
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    return {
        "model": blueprint.checkpoint.name,
        "experts": blueprint.made_experts,
        "dense": blueprint.made_dense,
        "layout": digest,
    }


def _check_room(out: Path, nbytes: int, begun: _Begun) -> None:
    left = nbytes - sum((out / name).stat().st_size for name in begun.checksums)
    free = shutil.disk_usage(out).free
    if left > free:
        raise PlanError(
            f"{out} needs {format_bytes(left)} more, and its disk has {format_bytes(free)} free: give another folder"
        )


def _write(path: Path, jobs: Sequence[_Job], files: Sequence[Path]) -> str:
    """Writes one safetensors file, first beside its place; the SHA-256 of it."""
    begun, digest = path.with_suffix(".part"), hashlib.sha256()
    with begun.open("wb") as file:

        def write(data: Any) -> None:
            digest.update(data)
            file.write(data)

        write(_header(jobs))
        for job in jobs:
            for data in _data(job, files):
                write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(begun, path)
    return digest.hexdigest()


def _header(jobs: Sequence[_Job]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for job in jobs:
        for each in job.tensors:
            start, end = end, end + _nbytes(each)
            table[each.name] = {"dtype": NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data(job: _Job, files: Sequence[Path]) -> Iterator[Any]:
    """The bytes of the tensors of one weight, in their order."""
    if job.chosen is None:
        yield from _copied(files[job.entry.file], job.entry)
        return
    made = job.chosen.quantized(lambda entry: LazyTensor(files[entry.file], entry, _ignore)[...], job.entry)
    shape = (*([] if job.chosen.experts is None else [job.chosen.experts]), job.chosen.rows, job.chosen.columns)
    for each in job.tensors:
        tensor = description(job.chosen.format, shape) if each.suffix is None else made[each.suffix]
        yield host_bytes(tensor.to(each.dtype).contiguous().view(-1).view(torch.uint8))


def _copied(path: Path, entry: TensorEntry) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(entry.offset)
        left = entry.nbytes
        while left:
            data = file.read(min(left, CHUNK_NBYTES))
            if not data:
                raise OSError(f"{path} ends in the middle of a tensor")
            left -= len(data)
            yield data


def _write_rest(
    blueprint: Blueprint, out: Path, chosen: Mapping[str, Chosen], shards: Sequence[Sequence[_Job]], begun: _Begun
) -> None:
    """What belongs to a checkpoint beside its weights; config.json and the index come last."""
    folder = blueprint.checkpoint.folder
    for file in sorted({each for pattern in COPIED for each in folder.glob(pattern)}):
        if file.name not in ("config.json", INDEX) and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    owners = {
        each.name: name
        for name, shard in zip(sorted(begun.checksums), shards, strict=True)
        for job in shard
        for each in job.tensors
    }
    total = sum(job.nbytes for shard in shards for job in shard)
    metadata = {"total_size": total, "sha256": dict(sorted(begun.checksums.items())), "source": begun.identity}
    formats = {key: each.format for key, each in chosen.items()}
    transposed = [key for key, each in chosen.items() if each.transposed and each.experts is not None]
    config = dict(blueprint.checkpoint.config) | {"quantization_config": quantization_config(formats, transposed)}
    _write_json(out / "config.json", config)
    _write_json(out / INDEX, {"metadata": metadata, "weight_map": owners})
    begun.remove()


def _write_json(path: Path, value: Any) -> None:
    """Writes `value` in one piece: whatever interrupts it, the file is the old one or the new one."""
    beside = _beside(path)
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _beside(path: Path) -> Path:
    """Where what will be at `path` is written first; a kill may leave it there."""
    return path.with_name(path.name + ".part")


def _nbytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_NBYTES):
            digest.update(data)
    return digest.hexdigest()


def _ignore(nbytes: int) -> None:
    """Reading is counted by weight."""
