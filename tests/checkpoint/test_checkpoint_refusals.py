"""Unusable folders and files are refused before loading, by name and with advice."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemoe import CheckpointError, Engine
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.foreign.safetensors_table import read_table
from tests.support.checkpoints import Zoo, edit


@pytest.fixture
def folder(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of a valid checkpoint, for the test to damage."""
    return Path(shutil.copytree(zoo("mixtral"), tmp_path / "model"))


@pytest.fixture
def sharded(zoo: Zoo, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo("mixtral", max_shard_size="256KB"), tmp_path / "sharded"))


def header(file: Path, content: object) -> None:
    """Writes a safetensors file with `content` as its header, and 8 bytes of data."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


def refusal(model: str | Path, *parts: str, offline: bool = False) -> str:
    """The message, after checking that it has all of `parts` and that `plan_for` raises the same."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model, offline=offline)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    with pytest.raises(CheckpointError) as again:
        Engine.plan_for(model, offline=offline)
    assert str(again.value) == message
    return message


def test_a_valid_checkpoint_opens(folder: Path, sharded: Path) -> None:
    one, several = open_checkpoint(folder), open_checkpoint(str(sharded))
    assert (one.folder, one.name, len(one.files)) == (folder, str(folder), 1)
    assert len(several.files) > 1
    assert one.tensors.keys() == several.tensors.keys()
    assert one.nbytes == several.nbytes == sum(value.nbytes for value in load_file(one.files[0]).values())
    assert not one.has_tokenizer


def test_every_tensor_is_found_where_it_lies(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    for file in checkpoint.files:
        for key, value in load_file(file).items():
            entry = checkpoint.tensors[key]
            assert checkpoint.files[entry.file] == file
            raw = file.read_bytes()[entry.offset : entry.offset + entry.nbytes]
            found = torch.frombuffer(bytearray(raw), dtype=entry.dtype).view(entry.shape)
            assert torch.equal(found, value)


def test_a_folder_that_does_not_exist() -> None:
    for name in ("/no/such/model", "./no/model", "~/no-such-model-here", "plainname"):
        refusal(name, name, "does not exist", "as model=")


def test_a_file_where_a_folder_should_be(folder: Path) -> None:
    refusal(folder / "config.json", "config.json is not a folder", "as model=")


@pytest.mark.parametrize(("offline", "mend"), [(True, "run once without offline="), (False, "check the connection")])
def test_a_hugging_face_id_that_is_not_in_the_cache(offline: bool, mend: str) -> None:
    refusal(
        "nobody/no-such-model", "nobody/no-such-model", "not in the local Hugging Face cache", mend, offline=offline
    )


def test_no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    refusal(folder, str(folder), "has no config.json", "model= must name the folder")


@pytest.mark.parametrize("content", ["{", "", "\x00\x01"])
def test_a_configuration_that_is_no_json(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refusal(folder, "config.json cannot be read as JSON", "fetch the checkpoint again")


@pytest.mark.parametrize("content", ["{}", "[]", '"mixtral"'])
def test_a_configuration_that_names_no_family(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refusal(folder, "config.json names no model_type", "model= must name the folder of a transformers checkpoint")


@pytest.mark.parametrize("settings", [{"quant_method": "aqlm"}, {"quant_method": ["fp8"]}, {"bits": 4}])
def test_unknown_quantisations(folder: Path, settings: dict[str, Any]) -> None:
    edit(folder / "config.json", lambda config: config.update(quantization_config=settings))
    method = str(settings.get("quant_method", "unknown"))
    refusal(folder, f"is quantised ({method})", "edgemoe reads auto-round, awq, bitsandbytes")


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "awq", "modelopt", "bitsandbytes", "auto-round"])
def test_a_quantisation_without_packed_weights(folder: Path, method: str) -> None:
    edit(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": method}))
    refusal(folder, f"says that it is quantised ({method})", "has no packed weights")


@pytest.mark.parametrize("settings", ["fp8", 5, [1], True])
def test_a_quantisation_that_is_no_object(folder: Path, settings: object) -> None:
    edit(folder / "config.json", lambda config: config.update(quantization_config=settings))
    refusal(folder, "quantization_config is", "not an object")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_weights_only(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refusal(folder, str(folder), "pickle weights only, which can run code", "convert it with save_pretrained")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refusal(folder, "has no *.safetensors file", "fetch the weights")


def test_weights_under_another_name_are_found(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert len(open_checkpoint(folder).files) == 1


def test_a_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    refusal(sharded, f"lacks 1 of {len(shards)} shards", shards[1].name, "fetch it again")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 5}'])
def test_a_damaged_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    refusal(sharded, "model.safetensors.index.json cannot be read", "fetch the checkpoint again")


@pytest.mark.parametrize("lost", [1, 1000, 100_000])
def test_a_truncated_shard(sharded: Path, lost: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - lost)
    refusal(sharded, f"{shard} is truncated", "fetch it again")


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_file_that_ends_in_its_header(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(size)
    refusal(folder, f"{file} is truncated or no safetensors file ({size} bytes)", "fetch it again")


def test_a_file_of_another_format(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"<!DOCTYPE html>" * 100)
    refusal(folder, "is truncated or no safetensors file (1500 bytes)", "fetch it again")


@pytest.mark.parametrize(
    "content",
    [
        b"{ no json }",
        [],
        "text",
        {"w": 5},
        {"w": {"dtype": "F32"}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": "all"}},
        {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}},
        {"w": {"dtype": "F32", "shape": "two", "data_offsets": [0, 8]}},
    ],
    ids=str,
)
def test_a_damaged_header(folder: Path, content: object) -> None:
    """The message names the file, whatever is wrong in its header."""
    file = folder / "model.safetensors"
    header(file, content)
    refusal(folder, str(file), "fetch it again")


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file({"w": torch.ones(2)}, file, metadata={"format": "pt"})
    assert [key for key, _ in read_table(file, 0)] == ["w"]


@pytest.mark.parametrize("name", ["U16", "F4"])
def test_a_dtype_that_is_not_supported(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    header(file, {"model.embed_tokens.weight": {"dtype": name, "shape": [8], "data_offsets": [0, 8]}})
    refusal(folder, "model.embed_tokens.weight", f"dtype {name}", "bf16, fp16 and fp32")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leads_nowhere(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "gone")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refusal(folder, "model.safetensors is a pipe")


def test_weights_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def refuse(path: Any, *how: Any, **more: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *how, **more)

    monkeypatch.setattr(os, "open", refuse)
    refusal(folder, "model.safetensors cannot be read (Permission denied)", "give it to this user")
