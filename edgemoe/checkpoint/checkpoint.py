"""A checkpoint on disk: its configuration, and the place of each tensor in its files. Loads no tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from edgemoe.cache.file_reader import FileIdentity
from edgemoe.checkpoint.foreign.config_values import check_config
from edgemoe.checkpoint.foreign.foreign_file import check_file
from edgemoe.checkpoint.foreign.foreign_json import MAX_INDEX, read_json, read_object
from edgemoe.checkpoint.foreign.safetensors_table import read_table
from edgemoe.checkpoint.gguf.gguf_checkpoint import gguf_config, gguf_weights
from edgemoe.checkpoint.gguf.gguf_file import GgufFile, read_gguf
from edgemoe.checkpoint.gguf.gguf_tokenizer import has_vocabulary
from edgemoe.checkpoint.hub import Repository
from edgemoe.checkpoint.model_place import find_place, path_of, place_name
from edgemoe.checkpoint.packed import quantization
from edgemoe.checkpoint.packed.packed_tensor import MergedTensor, PackedTensor, Weight
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.errors import CheckpointError
from edgemoe.values import shown

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of weights that are not packed."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of all weights, and the one that says which shard has which tensor."""
MAX_FILE_NAME = 255
"""Characters of a file's name, as file systems limit it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder: its weight files, its tensors by name, and its `config.json` as a dictionary.

    `packed` are weights that tensors of the files make up, which are not among `tensors` then.
    """

    folder: Path
    name: str
    """The name that the user gave, for messages."""
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    packed: Mapping[str, PackedTensor | MergedTensor] = field(default_factory=dict)
    gguf: GgufFile | None = None
    """The file that the configuration and the tokenizer come from; None where the folder has them."""
    identities: tuple[FileIdentity, ...] = ()
    """Those of `files` before their headers were read."""

    @property
    def weights(self) -> dict[str, Weight]:
        """All tensors and packed weights, by the names that transformers knows."""
        return {**self.tensors, **self.packed}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and packed weights."""
        return sum(entry.nbytes for entry in self.weights.values())

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has tokenizer files; without them prompts must be token ids."""
        if self.gguf is not None and has_vocabulary(self.gguf):
            return True
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
        return any(os.path.lexists(self.folder / name) for name in names)


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    offline: bool = False,
    name: str | None = None,
    setting: str = "model",
    check: Callable[[Checkpoint], object] | None = None,
    model_config: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Finds `model`, a folder, a GGUF file or a Hugging Face id, and reads its configuration and tensor tables.

    A folder or an id with GGUF files may be followed by a colon and the quantisation, or a file's name.
    `name` is what messages and results call it; None takes `model` itself. `setting` is the argument that messages
    tell a user to correct. `check` is given the checkpoint without its weights, before these are fetched, and raises
    what speaks against it. `model_config` is a folder or an id with the configuration of a GGUF file.

    Downloads a Hugging Face id that is not in the local cache, unless `offline`. Raises CheckpointError if the
    checkpoint cannot be found or read, is quantised, has only pickle weights, or has a damaged or truncated file.
    """
    place = place_name(model, setting)
    name = name or place

    def check_folder(folder: Path) -> None:
        config = read_config(folder, name, setting)
        if check is not None:
            check(Checkpoint(folder, name, config, (), {}))

    folder = find_place(place, offline, setting, check_folder, _chosen_weights)
    if not folder.is_dir():
        beside = None if model_config is None else _config_folder(os.fspath(model_config), offline)
        return _open_gguf(folder, name, beside)
    config = read_config(folder, name, setting)
    files, owners = _weight_files(folder, name)
    tensors: dict[str, TensorEntry] = {}
    identities = _identities(files)
    for number, file in enumerate(files):
        for key, entry in read_table(file, number):
            first = tensors.get(key)
            # Of two copies the one that the index names counts; the other one was left behind.
            if first is not None and owners.get(key) not in (files[first.file].name, file.name):
                raise CheckpointError(
                    f"{name}: tensor {key} is in {file.name} and in {files[first.file].name}: remove one of them"
                )
            if first is None or owners[key] == file.name:
                tensors[key] = entry
    quantised = config.get("quantization_config")
    if not quantised:
        return Checkpoint(folder, name, config, tuple(files), tensors, identities=identities)
    found = quantization.unpack(tensors, quantised, name, _reader(files))
    return Checkpoint(folder, name, config, tuple(files), found.tensors, found.packed, identities=identities)


def _identities(files: Sequence[Path]) -> tuple[FileIdentity, ...]:
    for file in files:
        check_file(file)
    return tuple(FileIdentity.of(file) for file in files)


def _config_folder(name: str, offline: bool) -> Path:
    """The folder with a configuration and a tokenizer: without weights, where it comes from a hub."""
    folder = path_of(name, "model_config")
    if folder.is_dir():
        return folder
    return Repository(name, offline, "model_config").fetch(lambda folder: None)


def _open_gguf(path: Path, name: str, folder: Path | None) -> Checkpoint:
    """The checkpoint in a GGUF file, or in a split one whose first file is `path`; `folder` has its configuration."""
    file = read_gguf(path)
    config = _gguf_config(file, name) if folder is None else read_config(folder, str(folder), "model_config")
    weights = gguf_weights(file, name)
    tensors, packed = dict[str, TensorEntry](), dict[str, PackedTensor | MergedTensor]()
    for key, weight in weights.items():
        if isinstance(weight, TensorEntry):
            tensors[key] = weight
        else:
            packed[key] = weight
    found = Checkpoint(folder or path.parent, name, config, file.files, tensors, packed, identities=file.identities)
    # A tokenizer beside the configuration counts before that of the file.
    return found if folder is not None and found.has_tokenizer else replace(found, gguf=file)


def _gguf_config(file: GgufFile, name: str) -> dict[str, Any]:
    config = gguf_config(file, name)
    check_config(config, name)
    return config


def _reader(files: Sequence[Path]) -> Callable[[int, int, int], bytes]:
    def read(file: int, offset: int, count: int) -> bytes:
        with files[file].open("rb") as stream:
            stream.seek(offset)
            return stream.read(count)

    return read


def _chosen_weights(folder: Path, names: list[str]) -> list[str]:
    """Of a repository's files `names` those of the weights; `folder` has its index, if there is one."""
    if SINGLE in names:
        return [SINGLE]
    if INDEX in names:
        return sorted(set(read_index(folder / INDEX).values()))
    return [name for name in names if "/" not in name and name.endswith(".safetensors") and not _is_other_format(name)]


def _is_other_format(name: str) -> bool:
    """Whether a file has the same weights in Mistral's own format, beside transformers' or alone."""
    return name.startswith("consolidated")


def read_config(folder: Path, name: str, setting: str) -> dict[str, Any]:
    """The `config.json` in `folder`, of the model called `name`.

    Raises CheckpointError where it cannot be read, names no family, or says a quantisation that is not read.
    """
    path = folder / "config.json"
    if not os.path.lexists(path) and os.access(folder, os.X_OK):
        raise CheckpointError(
            f"{name} has no config.json: {setting}= must name the folder of a transformers checkpoint"
        )
    config = read_json(path)
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(
            f"{path} names no model_type: {setting}= must name the folder of a transformers checkpoint"
        )
    check_config(config, str(path))
    quantised = config.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise CheckpointError(f"{path}: quantization_config is {shown(quantised)}, not an object: fetch it again")
    if quantised:
        quantization.check_method(quantised, name)
    return config


def _weight_files(folder: Path, name: str) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and for each tensor that an index names the name of its file.

    As in transformers, one file of all weights counts before an index, which may be left from another checkpoint.
    """
    index, single = folder / INDEX, folder / SINGLE
    if os.path.lexists(single):
        return [single], {}
    if os.path.lexists(index):
        owners = read_index(index)
        files = [folder / shard for shard in sorted(set(owners.values()))]
        missing = [file.name for file in files if not os.path.lexists(file)]
        if missing:
            raise CheckpointError(
                f"{name} lacks {len(missing)} of {len(files)} shards, {missing[0]} first: fetch it again"
            )
        return files, owners
    others = sorted(file for file in folder.glob("*.safetensors") if not _is_other_format(file.name))
    if others:
        return others, {}
    if any(folder.glob("consolidated*.safetensors")):
        raise CheckpointError(f"{name} has consolidated weights only: fetch those in transformers' format")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{name} has pickle weights only, which can run code: convert it with save_pretrained to safetensors"
        )
    raise CheckpointError(f"{name} has no *.safetensors file: fetch the weights as well as the configuration")


def read_index(index: Path) -> dict[str, str]:
    """The file's name for each tensor's, of an index. Raises CheckpointError for a name that leads elsewhere."""
    owners = read_object(index, MAX_INDEX, unique=True).get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise CheckpointError(f"{index} cannot be read (its weight_map is no table): fetch the checkpoint again")
    for tensor, file in owners.items():
        if not _is_file_name(file):
            raise CheckpointError(
                f"{index} cannot be read (the shard of {shown(tensor)} is {shown(file)}, which is no file beside it): "
                "fetch the checkpoint again"
            )
    return owners


def _is_file_name(name: object) -> bool:
    """Whether `name` is that of a file in the folder itself."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_FILE_NAME or name in (".", ".."):
        return False
    return not set(name) & set("/\\\0")
