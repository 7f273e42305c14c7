"""The checkpoints on this machine: in the hub's cache, and in folders. Reads no weights and never uses the network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgemoe.checkpoint import hub
from edgemoe.checkpoint.blueprint import Blueprint, check_family, read_blueprint
from edgemoe.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_config
from edgemoe.checkpoint.foreign.foreign_json import read_object
from edgemoe.checkpoint.gguf.gguf_variant import GgufVariant, variants
from edgemoe.errors import CheckpointError, told_as

DEPTH = 2
"""How far below a given folder checkpoints are looked for."""
UNFINISHED = ".cache/huggingface/download"
"""Where the hub's library keeps what it has not finished, in a folder that it fetches into."""


@dataclass(frozen=True)
class CatalogEntry:
    """A checkpoint that was found."""

    model: str
    """What to give as the model."""
    nbytes: int
    """Bytes of its files."""
    family: str | None
    """Its `model_type` in transformers; None where that cannot be read."""
    formats: tuple[str, ...] = ()
    """The names of the formats of its experts, most of them first; empty where they cannot be read."""
    blueprint: Blueprint | None = None
    """What a plan needs, without a check of the experts' shapes; None where edgemoe cannot run it."""
    problem: str = ""
    """Why not."""


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint may be: a folder, or the first file of a GGUF model."""

    model: str
    path: Path
    files: tuple[Path, ...]
    unfinished: tuple[Path, ...] = ()
    """What is left of a download that has not ended."""
    in_hub_cache: bool = False


def find(folders: Sequence[str | os.PathLike[str]] = (), *, hub_cache: bool = True) -> Iterator[CatalogEntry]:
    """The checkpoints in the hub's cache, unless `hub_cache` is false, and in `folders`, one by one.

    A folder is a checkpoint itself, or has checkpoints and GGUF files at most two levels below it. Each GGUF model is
    an entry of its own. What cannot be run is an entry with its `problem`, and so is a folder that does not exist.
    """
    if hub_cache:
        for name in hub.cached_repositories():
            yield from _entries(name, _in_repository)
    for folder in folders:
        yield from _entries(os.fspath(folder), _given)


def _entries(name: str, search: Callable[[str], Iterator[_Place]]) -> Iterator[CatalogEntry]:
    try:
        places = list(search(name))
    except OSError as error:
        yield CatalogEntry(name, 0, None, problem=f"cannot be read ({error.strerror or error})")
        return
    yield from map(_read, places)


def _given(name: str) -> Iterator[_Place]:
    path = Path(os.path.expanduser(name))
    if path.is_dir() and os.access(path, os.R_OK | os.X_OK):
        yield from _in_folder(path, DEPTH)
    else:
        yield _Place(name, path, (path,))


def _in_folder(folder: Path, depth: int) -> Iterator[_Place]:
    try:
        names = [each.name for each in os.scandir(folder)]
    except OSError:
        return
    models = variants(names)
    weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    has_config = hub.CONFIG in names
    unfinished = tuple((folder / UNFINISHED).rglob("*.incomplete"))
    if (has_config and (weights or not models)) or (unfinished and not models):
        yield _Place(str(folder), folder, _files(folder), unfinished)
    for model in models:
        files = tuple(folder / name for name in model.files)
        yield _Place(str(files[0]), files[0], files)
    if depth and not has_config:
        for name in sorted(names):
            if not name.startswith(".") and (folder / name).is_dir():
                yield from _in_folder(folder / name, depth - 1)


def _in_repository(name: str) -> Iterator[_Place]:
    """What the local cache has of the repository `name`: one checkpoint of transformers at most, and GGUF models."""
    snapshots, unfinished = hub.cached_snapshots(name), tuple(hub.partial_files(name))
    cached = hub.cached_files(name)
    models = variants(cached)
    yield from (_gguf_place(name, model, cached) for model in models)
    with_config = [snapshot for snapshot in snapshots if (snapshot / hub.CONFIG).exists()]
    safetensors = any(file.endswith((".safetensors", ".safetensors.index.json")) for file in cached)
    if with_config and (safetensors or not models):
        yield _Place(name, with_config[0], _files(with_config[0]), unfinished, True)
    elif unfinished:
        # Of GGUF files that are not there yet the cache does not have the names.
        yield _Place(name, unfinished[0], () if models else tuple(cached.values()), unfinished, True)
    elif cached and not models:
        yield _Place(name, snapshots[0], tuple(cached.values()))


def _gguf_place(name: str, model: GgufVariant, cached: dict[str, Path]) -> _Place:
    files = tuple(cached[file] for file in model.files)
    return _Place(f"{name}:{model.tag}", files[0], files)


def _files(folder: Path) -> tuple[Path, ...]:
    """The files of a checkpoint of transformers, without GGUF files, which are models of their own."""
    return tuple(file for file in folder.rglob("*") if file.suffix != ".gguf" and file.is_file())


def _read(place: _Place) -> CatalogEntry:
    nbytes = _nbytes((*place.files, *place.unfinished))
    try:
        with told_as(lambda why: CheckpointError(f"{place.model} cannot be read ({why})"), of_files=True):
            found = _blueprint(place)
            return CatalogEntry(place.model, nbytes, found.config.model_type, found.expert_formats, found)
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{place.model} ").removeprefix("is ")
        return CatalogEntry(place.model, nbytes, _family(place.path), problem=problem)


def _blueprint(place: _Place) -> Blueprint:
    if not place.path.exists():
        raise CheckpointError(f"{place.model} does not exist")
    try:
        checkpoint = open_checkpoint(place.path, offline=True, name=place.model)
    except CheckpointError as error:
        if not place.unfinished:
            raise
        if (place.path / hub.CONFIG).exists():
            # Nobody wants the rest of what cannot be run.
            config = read_config(place.path, place.model, "model")
            check_family(Checkpoint(place.path, place.model, config, (), {}))
        rest = "give it as model= to fetch the rest" if place.in_hub_cache else "fetch the rest"
        raise CheckpointError(f"{place.model} is partly downloaded: {rest}") from error
    return read_blueprint(checkpoint, quick=True)


def _nbytes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _family(folder: Path) -> str | None:
    """What the configuration in `folder` says, read by itself."""
    try:
        family = read_object(folder / hub.CONFIG).get("model_type")
    except CheckpointError:
        return None
    return family if isinstance(family, str) else None
