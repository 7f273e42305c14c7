"""Configurations, generation settings, indexes, headers of safetensors files, and state files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench.guest.parser import Parser
from bench.support.zoo import make
from edgemoe import CheckpointError, PlanError
from edgemoe.checkpoint import heat_file
from edgemoe.checkpoint.blueprint import read_blueprint
from edgemoe.checkpoint.checkpoint import open_checkpoint, read_config, read_index
from edgemoe.checkpoint.foreign.config_values import check_config
from edgemoe.checkpoint.foreign.foreign_json import parse_json
from edgemoe.checkpoint.foreign.generation_values import check_generation, check_generation_file
from edgemoe.checkpoint.foreign.safetensors_table import read_table
from edgemoe.checkpoint.foreign.tokenizer_values import check_tokenizer, check_tokenizer_files
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.demo import demo_folder
from edgemoe.plan.performance_model import Locality, MachineSpeed, ModelShape, PerformanceModel, Routing, Times
from edgemoe.plan.profile import Profile, ProfileConditions, parse_profile

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
TEMPERATURES = {
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
    "eos_token_id": [1, 2], "bad_words_ids": [[3]], "max_new_tokens": 5, "stop_strings": ["x"],
}  # fmt: skip


DATA_NBYTES = 8 << 20
"""Of the tensors of a sample, without values."""


def _written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _config_samples(folder: Path) -> list[bytes]:
    made = [make(family, folder / family) / "config.json" for family in FAMILIES]
    return [path.read_bytes() for path in [*made, demo_folder() / "config.json"]]


def _object(data: bytes) -> dict[str, Any]:
    found = parse_json(data)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def _config(data: bytes, folder: Path) -> None:
    check_config(_object(data), "it")


def _config_file(data: bytes, folder: Path) -> None:
    _written(folder, "config.json", data)
    read_config(folder, "it", "model")


def _whole_samples(folder: Path) -> list[bytes]:
    return [(make("mixtral", folder / "whole") / "config.json").read_bytes()]


def _whole(data: bytes, folder: Path) -> None:
    """A checkpoint with a changed configuration, up to the point where its weights would be read."""
    _written(folder / "whole", "config.json", data)
    read_blueprint(open_checkpoint(folder / "whole", offline=True))


def _generation_samples(folder: Path) -> list[bytes]:
    return [json.dumps(TEMPERATURES).encode()]


def _generation(data: bytes, folder: Path) -> None:
    check_generation(_object(data), "it")


def _generation_file(data: bytes, folder: Path) -> None:
    check_generation_file(_written(folder, "generation_config.json", data))


def _index_samples(folder: Path) -> list[bytes]:
    shards = {f"model.layers.{layer}.weight": f"model-{layer:05}-of-00002.safetensors" for layer in (1, 2)}
    return [json.dumps({"metadata": {"total_size": 8}, "weight_map": shards}).encode()]


def _index(data: bytes, folder: Path) -> None:
    read_index(_written(folder, "model.safetensors.index.json", data))


def _header_samples(folder: Path) -> list[bytes]:
    small = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "c": {"dtype": "U8", "shape": [0], "data_offsets": [22, 22]},
    }
    whole = (make("mixtral", folder / "tiny") / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return [json.dumps(small).encode(), whole[8 : 8 + length]]


def _header(data: bytes, folder: Path) -> None:
    path = _written(folder, "header.safetensors", len(data).to_bytes(8, "little") + data)
    os.truncate(path, len(data) + DATA_NBYTES)
    list(read_table(path, 0))


def _file_samples(folder: Path) -> list[bytes]:
    sample = _header_samples(folder)[0]
    return [len(sample).to_bytes(8, "little") + sample + bytes(22)]


def _file(data: bytes, folder: Path) -> None:
    list(read_table(_written(folder, "whole.safetensors", data), 0))


def _profile_samples(folder: Path) -> list[bytes]:
    model = PerformanceModel(
        ModelShape(4, 8, 2, 1000, 1000, 2),
        MachineSpeed(1e10, 1e11, 1e9),
        Routing(8.0, 0.9, 0.8),
        Locality(1.0, 1.0),
        Times(1e-3, 1e-3, 1e-3, 1e-3, 0.5, 1.01, 1e-4, 1e-4, 1e-4, 1e-4, 0.5, 64, 1e-3, 1e-4, 0.5),
    )
    conditions = ProfileConditions("cpu", 2, 24, "cpu", 0, "2", "bfloat16", "bf16", 2, None, True, "file")
    return [json.dumps(Profile("2026-01-31", conditions, model, ()).to_dict()).encode()]


def _profile(data: bytes, folder: Path) -> None:
    parse_profile(data)


def _heat_samples(folder: Path) -> list[bytes]:
    state = StateFolder(folder)
    heat_file.write(state, [8, 8], dict.fromkeys(heat_file.read(state, [8, 8]), 0.5))
    header = {"format": heat_file.FORMAT, "version": heat_file.VERSION}
    return [json.dumps(header | {"experts": [8, 8], "heat": [[0, 1, 0.5], [1, 7, 0.25]]}).encode()]


def _heat(data: bytes, folder: Path) -> None:
    _written(folder, heat_file.NAME, data)
    heat_file.read(StateFolder(folder), [8, 8])


def _tokenizer_samples(folder: Path) -> list[bytes]:
    normalizer = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            {"type": "Prepend", "prepend": "▁"},
            {"type": "NFC"},
        ],
    }
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\s+(?!\S)"}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": {"a": 0, "▁": 1}, "merges": []}
    return [json.dumps({"normalizer": normalizer, "pre_tokenizer": split, "decoder": None, "model": model}).encode()]


def _tokenizer(data: bytes, folder: Path) -> None:
    check_tokenizer(_object(data), "it")


def _tokenizer_file(data: bytes, folder: Path) -> None:
    (folder / "tokenizer").mkdir(exist_ok=True)
    _written(folder / "tokenizer", "tokenizer.json", data)
    check_tokenizer_files(folder / "tokenizer")


REFUSED = (CheckpointError,)
VALUES = (CheckpointError, ValueError)
PARSERS = (
    Parser("configuration", _config_samples, _config, VALUES, share=3.0),
    Parser("config.json", _config_samples, _config_file, REFUSED, share=0.1),
    Parser("checkpoint", _whole_samples, _whole, (CheckpointError, PlanError), share=0.01),
    Parser("generation settings", _generation_samples, _generation, VALUES, share=3.0),
    Parser("generation_config.json", _generation_samples, _generation_file, REFUSED, share=0.1),
    Parser("index", _index_samples, _index, REFUSED, share=0.5),
    Parser("safetensors header", _header_samples, _header, REFUSED, share=0.5),
    Parser("safetensors file", _file_samples, _file, REFUSED, share=0.5, text=False),
    Parser("profile", _profile_samples, _profile, (ValueError,)),
    Parser("heat", _heat_samples, _heat, (), share=0.5),
    Parser("tokenizer", _tokenizer_samples, _tokenizer, VALUES, share=2.0),
    Parser("tokenizer.json", _tokenizer_samples, _tokenizer_file, REFUSED, share=0.1),
)
