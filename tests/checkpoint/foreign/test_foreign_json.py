"""JSON and files of others: what is read, and what is refused with its reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from edgemoe import CheckpointError
from edgemoe.checkpoint.foreign.config_values import check_config
from edgemoe.checkpoint.foreign.foreign_file import open_file, read_file
from edgemoe.checkpoint.foreign.foreign_json import MAX_DEPTH, is_deeper, parse_json, read_json, read_object
from edgemoe.checkpoint.foreign.generation_values import check_generation
from edgemoe.checkpoint.state_folder import StateFolder


def test_sound_json_is_read() -> None:
    assert parse_json(b'{"a": [1, 2.5, "x", null, true]}', unique=True) == {"a": [1, 2.5, "x", None, True]}
    assert parse_json(b"[Infinity]") == [float("inf")]


@pytest.mark.parametrize(
    ("data", "how", "why"),
    [
        (b"[" * 200_000, {}, "nested too deep"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), {}, f"deeper than {MAX_DEPTH} levels"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, {}, f"deeper than {MAX_DEPTH} levels"),
        (b"9" * 400, {}, "has 400 digits"),
        (b"9" * 5000, {}, "has 5000 digits"),
        (b'{"a": 1, "a": 2}', {"unique": True}, "has 'a' twice"),
        (b"[NaN]", {"finite": True}, "NaN is no number"),
        (b"\xff\xfe", {}, "utf-8"),
        (b"", {}, "Expecting value"),
    ],
)
def test_other_json_is_refused(data: bytes, how: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(data, **how)


def test_the_depth_is_that_of_lists_and_objects() -> None:
    value: Any = 1
    for depth in range(1, 5):
        value = [value] if depth % 2 else {"a": value}
        assert is_deeper(value, depth - 1)
        assert not is_deeper(value, depth)


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    file.write_bytes(b"[1]")
    assert read_file(file, 3) == b"[1]"
    with pytest.raises(CheckpointError, match=r"it.json has 3 bytes, and such a file has 2 at most"):
        read_file(file, 2)
    with pytest.raises(CheckpointError, match="no object"):
        read_object(file)
    file.write_bytes(b"[")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_json(file)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    link = tmp_path / "link"
    link.symlink_to(file)
    stream, size = open_file(link)
    with stream:
        assert (stream.read(), size) == (b"x", 1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "lost").symlink_to("gone")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, why in (
        ("pipe", "a pipe"), ("loop", "leads back to itself"), ("lost", "to nowhere"), ("zero", "a device"),
        ("", "a folder"), ("none", "No such file"), ("file/x", "Not a directory"), ("a" * 300, "too long"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=why):
            open_file(tmp_path / name)


def test_a_state_file_that_is_a_pipe_is_ignored(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "heat.json")
    assert StateFolder(tmp_path).read("heat.json", 100) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": -1}, "hidden_size is -1, and must be an integer from 1 to"),
        ({"text_config": {"vocab_size": 10**30}}, "text_config.vocab_size is 1000"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and must be from 1 to the number of experts, 8"),
        ({"num_key_value_heads": 3}, "does not divide the 4"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_parameters": {"factor": 1e30}}, r"rope_parameters.factor is 1e\+30"),
        ({"moe_intermediate_size": [4, -4]}, "moe_intermediate_size is"),
        ({"hidden_act": 5}, "the name of a function"),
        ({"eos_token_id": [1, "x"]}, "the id of a token"),
    ],
)
def test_a_configurations_values(change: dict[str, Any], why: str) -> None:
    sound = {"model_type": "it", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sound |= {"num_experts": 8, "num_experts_per_tok": 2, "sliding_window": -1, "limits": [0.0, float("inf")]}
    check_config(sound, "it")
    with pytest.raises(CheckpointError, match=why):
        check_config(sound | change, "it")


def test_generation_settings() -> None:
    check_generation({"temperature": 0.7, "eos_token_id": [1], "top_k": None, "unknown": "x"}, "it")
    for name, value in (("temperature", "abc"), ("top_p", 0), ("eos_token_id", [[1]]), ("top_k", True)):
        with pytest.raises(CheckpointError, match=f"it: {name} is .*, and must be"):
            check_generation({name: value}, "it")
