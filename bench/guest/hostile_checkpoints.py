"""Checkpoints that someone has broken on purpose, each in one thing. All must be refused in one sentence, at once."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DEEP = 200_000
TEMPERATURES: dict[str, Any] = {
    "temperature": ("abc", float("nan"), [1], 1e308, -1), "top_k": (-1, [], 1.5), "top_p": (-1, "x", 2),
    "min_p": (-1, "x"), "repetition_penalty": (0, -1, "x", float("nan")), "eos_token_id": ([[1]], 1.5, "x"),
    "max_new_tokens": (-1, "x", 10**30), "bad_words_ids": ([1], "x"), "do_sample": ("yes",), "stop_strings": (5, [5]),
}  # fmt: skip
SIZES = (
    "num_local_experts", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "num_hidden_layers", "num_experts_per_tok",
)  # fmt: skip
OTHERS: dict[str, Any] = {
    "quantization_config": ([1], "fp8", 5, True), "model_type": ([1], {}, None, "nosuch"),
    "hidden_act": ("nosuch", [1]), "rms_norm_eps": ("x", float("nan")), "sliding_window": ("x", -7),
    "rope_parameters": ([1], {"rope_type": "nosuch"}),
    "eos_token_id": ([[1]], 1.5), "num_hidden_layers": (10**9, 1000), "num_experts_per_tok": (9,), "head_dim": (-1, 3),
}  # fmt: skip
TEMPLATES = {
    "a wide field": "{{ '%2000000000s' % 'x' }}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "a long repetition": "{{ 'a b ' * 3000000 }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a large power": "{{ 9 ** 99999999 }}",
    "100 MB": "x" * (100 << 20),
}


class Hostile(NamedTuple):
    """One change to a sound checkpoint of mixtral with a tokenizer, in one file."""

    name: str
    change: Callable[[Path], object]
    needs_load: bool = False
    """Whether only loading reads what is wrong; a plan is made without it."""


def cases() -> Iterator[Hostile]:
    """All of them. Each `change` is given the folder of a copy."""
    yield from _configs()
    yield from _indexes()
    yield from _headers()
    for name in ("config.json", "model.safetensors"):
        yield from _no_files(name)
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        yield from (each._replace(needs_load=True) for each in _no_files(name))
    for field, values in TEMPERATURES.items():
        for value in values:
            change = _edited("generation_config.json", {"do_sample": True} | {field: value})
            yield Hostile(f"generation_config.json {field} {value!r:.20}", change, needs_load=True)
    for name, source in TEMPLATES.items():
        yield Hostile(f"template: {name}", _replaced("chat_template.jinja", source), needs_load=True)
    yield from _tokenizers()


def _configs() -> Iterator[Hostile]:
    for text in ("[" * DEEP, '{"a":' * DEEP, '{"model_type": "mixtral", "x": ' + "9" * 400 + "}", "{", "\ufeff{}", "5"):
        yield Hostile(f"config.json {text[:12]!r}", _replaced("config.json", text))
    for field in SIZES:
        for value in (-1, 0, 10**30, "x", 1.5, float("nan"), True, [None]):
            yield Hostile(f"config.json {field} {value!r:.20}", _edited("config.json", {field: value}))
    for field, values in OTHERS.items():
        for value in values:
            yield Hostile(f"config.json {field} {value!r:.20}", _edited("config.json", {field: value}))


def _indexes() -> Iterator[Hostile]:
    for shard in (5, None, "", ".", "..", "../model.safetensors", "/etc/passwd", "a" * 5000, ["x"]):
        yield Hostile(f"index: shard {shard!r:.20}", _index(json.dumps({"weight_map": {"lm_head.weight": shard}})))
    twice = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    for text in ("[" * DEEP, "{}", '{"weight_map": []}', '{"weight_map": {}}', twice):
        yield Hostile(f"index: {text[:20]!r}", _index(text))


def _headers() -> Iterator[Hostile]:
    sound = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for part in (
        {"data_offsets": [0.0, 8.0]}, {"data_offsets": [0, 1 << 70]}, {"data_offsets": [-8, 0]}, {"data_offsets": 8},
        {"shape": [0, 1 << 63]}, {"shape": [-2]}, {"shape": [True, 2]}, {"shape": [1] * 99}, {"shape": "2"},
        {"dtype": 5}, {"dtype": "nosuch"}, {"data_offsets": [4, 12]},
    ):  # fmt: skip
        yield Hostile(f"header {part}"[:40], _header(json.dumps({"a": sound | part})))
    yield Hostile("header: overlapping", _header(json.dumps({"a": sound, "b": sound})))
    yield Hostile("header: twice", _header(f'{{"a": {json.dumps(sound)}, "a": {json.dumps(sound)}}}'))
    yield Hostile("header: deep", _header("[" * DEEP))
    yield Hostile(
        "header: longer than the file", lambda folder: _weights(folder).write_bytes(struct.pack("<Q", 1 << 40))
    )


def _no_files(name: str) -> Iterator[Hostile]:
    """What may be where the file `name` should be."""

    def emptied(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            make(folder / name)

        return change

    yield Hostile(f"{name}: a pipe", emptied(lambda path: os.mkfifo(path)))
    yield Hostile(f"{name}: a folder", emptied(lambda path: path.mkdir()))
    yield Hostile(f"{name}: an endless device", emptied(lambda path: path.symlink_to("/dev/zero")))
    yield Hostile(f"{name}: a link to nowhere", emptied(lambda path: path.symlink_to("gone")))
    yield Hostile(f"{name}: a link to itself", emptied(lambda path: path.symlink_to(path.name)))


def _tokenizers() -> Iterator[Hostile]:
    grow = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1000}
    for name, part in (
        ("exploding", {"normalizer": {"type": "Sequence", "normalizers": [grow] * 3}}),
        ("exploding decoder", {"decoder": {"type": "Sequence", "decoders": [grow] * 3}}),
        ("repeated repetition", {"pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}}),
    ):  # fmt: skip
        yield Hostile(f"tokenizer: {name}", _edited("tokenizer.json", part), needs_load=True)
    for text in ("[" * DEEP, "{", '{"model": 5}'):
        yield Hostile(f"tokenizer: {text[:12]!r}", _replaced("tokenizer.json", text), needs_load=True)


def _edited(name: str, fields: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | fields))

    return change


def _replaced(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def _index(text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        _weights(folder).rename(folder / "x.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def _header(text: str) -> Callable[[Path], object]:
    return lambda folder: _weights(folder).write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(8))


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"
