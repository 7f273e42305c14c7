"""GGUF files: read as they are, with what llama.cpp's converter does undone; damaged and hostile ones refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from bench.field.case import reference, reply
from bench.support.gguf_files import ARCHITECTURES, GgufMaker
from edgemoe import CheckpointError, Engine
from edgemoe.cache import slot_classes
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.gguf.gguf_file import read_gguf
from edgemoe.checkpoint.gguf.gguf_tokenizer import tokenizer_of
from edgemoe.quiet import quiet_transformers

PROMPT = (5, 60, 70, 80, 9)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_file_in_floats_is_the_checkpoint(family: str, tmp_path: Path) -> None:
    """Every name, order of rows and value that the converter changes is undone."""
    with quiet_transformers():
        made = GgufMaker.of_zoo(family, tmp_path)
        file = made.write(tmp_path / "model.gguf")
        assert reply(file, PROMPT, 12) == reference(made.folder, PROMPT, 12)


@pytest.mark.parametrize("experts", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.F16])
def test_packed_experts_keep_the_bytes_of_the_file(experts: Kind, tmp_path: Path) -> None:
    with quiet_transformers():
        made = GgufMaker.of_zoo("qwen3_moe", tmp_path)
        file = made.write(tmp_path / "model.gguf", experts, Kind.Q8_0)
        blueprint = open_blueprint(file)
    names = {kind.name for moe in blueprint.experts_modules for kind in moe.formats.values()}
    if experts is not Kind.F16:
        assert names == {experts.name}
        assert all(source.assemble is None for source in blueprint.records.values())
    assert len(reply(file, PROMPT, 4, sampling={"ignore_eos": True})) == 4


def test_the_same_values_as_a_widened_file(tmp_path: Path) -> None:
    """A packed file says what a float file of its dequantised values says."""
    with quiet_transformers():
        made = GgufMaker.of_zoo("mixtral", tmp_path)
        packed = made.write(tmp_path / "packed.gguf", Kind.Q8_0, Kind.Q8_0)
        read = read_gguf(packed)
        from gguf import quants

        values = {}
        raw = packed.read_bytes()
        import numpy as np

        for name, tensor in read.tensors.items():
            data = np.frombuffer(raw, np.uint8, tensor.nbytes, tensor.offset)
            if tensor.format.name == "Q8_0":
                rows = data.reshape(*tensor.shape[:-1], -1)
                values[name] = quants.dequantize(rows, Kind.Q8_0)
            else:
                values[name] = data.view(np.float32).reshape(tensor.shape)
        writer = GGUFWriter(str(tmp_path / "wide.gguf"), made.arch)
        made.describe(writer)
        for name, array in values.items():
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert reply(packed, PROMPT, 16) == reply(tmp_path / "wide.gguf", PROMPT, 16)


MIXES: dict[str, dict[str, Kind | None]] = {
    "larger down projections, as in Q4_K_M": {f"blk.{layer}.ffn_down_exps.weight": Kind.Q8_0 for layer in (0, 3)},
    "a layer in floats": {f"blk.1.ffn_{name}_exps.weight": None for name in ("gate", "up", "down")},
    "three sizes": {"blk.0.ffn_down_exps.weight": Kind.F16, "blk.2.ffn_up_exps.weight": Kind.Q8_0},
}


@pytest.mark.parametrize("mix", MIXES)
def test_layers_of_different_types_have_slots_of_their_sizes(
    mix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever slots there are, the reply is that with a slot of the largest size for every expert."""
    with quiet_transformers():
        file = GgufMaker.of_zoo("qwen3_moe", tmp_path).write(tmp_path / "model.gguf", Kind.Q4_0, own=MIXES[mix])
        plan = Engine.plan_for(file, device="cpu", expert_cache="50%", state_folder="none")
        assert len(plan.slot_classes) == (3 if mix == "three sizes" else 2)
        assert sum(each.count for each in plan.slot_classes) == plan.slots == plan.experts // 2
        endless: Any = {"sampling": {"ignore_eos": True}}
        found = [reply(file, PROMPT, 12, expert_cache=slots, **endless) for slots in (1, 2, 3, 7, "50%", "100%")]
        monkeypatch.setattr(slot_classes, "MIN_USED_PERCENT", 0)
        assert len(Engine.plan_for(file, device="cpu", state_folder="none").slot_classes) == 1
        assert found == [reply(file, PROMPT, 12, **endless)] * len(found)


def test_a_configuration_beside_the_file(tmp_path: Path) -> None:
    with quiet_transformers():
        made = GgufMaker.of_zoo("qwen3_moe", tmp_path)
        file = made.write(tmp_path / "model.gguf")
        found = reply(file, PROMPT, 8, model_config=made.folder)
        assert found == reference(made.folder, PROMPT, 8)


def test_a_split_model(tmp_path: Path) -> None:
    """Its parts are read as one; a later part, or a missing one, is named."""
    with quiet_transformers():
        made = GgufMaker.of_zoo("qwen3_moe", tmp_path)
        whole = made.write(tmp_path / "whole.gguf")
        first = made.write_split(tmp_path / "model")
    assert reply(first, PROMPT, 8) == reply(whole, PROMPT, 8)
    with pytest.raises(CheckpointError, match="a later part of a split model: give the first one"):
        open_checkpoint(tmp_path / "model-00002-of-00002.gguf")
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 parts, model-00002-of-00002.gguf first"):
        open_checkpoint(first)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "model.gguf"), "arctic")
    writer.add_tensor("token_embd.weight", __import__("numpy").zeros((8, 8), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture arctic, and edgemoe reads qwen3moe"):
        open_checkpoint(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"none\.gguf does not exist"):
        open_checkpoint(tmp_path / "none.gguf")


# --- tokenizers ----------------------------------------------------------------------------------------


def vocabulary(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "tokens.gguf"
    writer = GGUFWriter(str(path), "qwen3moe")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(more.pop("pre", "qwen2"))
    writer.add_token_list(["<|end|>", "H", "i", "Ġ", "Hi", "ĠHi"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["H i", "Ġ Hi"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}<|end|>")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_tokenizer_and_the_template_come_from_the_file(tmp_path: Path) -> None:
    with quiet_transformers():
        tokenizer = tokenizer_of(read_gguf(vocabulary(tmp_path)))
    assert tokenizer.encode("Hi Hi<|end|>") == [4, 5, 0]
    assert tokenizer.decode([4, 5, 0], skip_special_tokens=True) == "Hi Hi"
    assert tokenizer.eos_token_id == 0
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi<|end|>"


def test_an_unknown_way_of_splitting_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="splits texts by nosuch, which is not read"):
        tokenizer_of(read_gguf(vocabulary(tmp_path, pre="nosuch")))


# --- hostile files -------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(
    tensors: list[bytes], entries: list[bytes], *, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    numbers = counts or (len(tensors), len(entries))
    return b"GGUF" + struct.pack("<IQQ", version, *numbers) + b"".join(entries) + b"".join(tensors)


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ENTRY = text("general.architecture") + struct.pack("<I", 8) + text("qwen3moe")
HOSTILE = {
    "nothing": b"",
    "another magic": b"GGML" + bytes(40),
    "version 1": header([], [], version=1),
    "endless tensors": header([], [], counts=(1 << 60, 0)),
    "endless entries": header([], [], counts=(0, 1 << 60)),
    "an endless text": header([], [struct.pack("<Q", 1 << 62)], counts=(0, 1)),
    "an endless array": header([], [text("a") + struct.pack("<IIQ", 9, 4, 1 << 61)], counts=(0, 1)),
    "deep arrays": header([], [text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000], counts=(0, 1)),
    "an unknown type of entry": header([], [text("a") + struct.pack("<I", 77)], counts=(0, 1)),
    "no alignment": header([], [text("general.alignment") + struct.pack("<II", 4, 0)]),
    "many dimensions": header([tensor("a", [1] * 9)], [ENTRY]),
    "a shape that overflows": header([tensor("a", [1 << 62, 1 << 62])], [ENTRY]),
    "an empty shape": header([tensor("a", [0, 4])], [ENTRY]),
    "beyond the end": header([tensor("a", [1 << 20])], [ENTRY]) + bytes(64),
    "an offset beyond the end": header([tensor("a", [4], offset=1 << 60)], [ENTRY]) + bytes(64),
    "tensors that overlap": header([tensor("a", [8]), tensor("b", [8], offset=4)], [ENTRY]) + bytes(256),
    "a name twice": header([tensor("a", [8]), tensor("a", [8], offset=32)], [ENTRY]) + bytes(256),
    "half of a block": header([tensor("a", [30], kind=8)], [ENTRY]) + bytes(256),
    "a type that is not read": header([tensor("a", [256], kind=34)], [ENTRY]) + bytes(256),
    "an unknown type": header([tensor("a", [256], kind=9999)], [ENTRY]) + bytes(256),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused_by_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        read_gguf(path)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count", "expert_used_count"])
def test_metadata_that_lack_something_are_named(key: str, tmp_path: Path) -> None:
    with quiet_transformers():
        made = GgufMaker.of_zoo("qwen3_moe", tmp_path)
        data = made.write(tmp_path / "model.gguf").read_bytes()
    spoilt = data.replace(f"qwen3moe.{key}".encode(), f"qwen3moe.{'x' * len(key)}".encode())
    assert spoilt != data
    (tmp_path / "model.gguf").write_bytes(spoilt)
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        open_blueprint(tmp_path / "model.gguf")


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    with quiet_transformers():
        data = GgufMaker.of_zoo("qwen3_moe", tmp_path).write(tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 11, 24, 60, 500, 3000, len(data) // 2, len(data) - 4096]:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_blueprint(cut)
