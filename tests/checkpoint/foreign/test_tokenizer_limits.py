"""Tokenizers that could take all memory or time, and texts that are far too long."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from edgemoe import CheckpointError, Engine, RequestError
from edgemoe.checkpoint.foreign.text_length import SLACK, SMALL_TEXT, check_text_length
from edgemoe.checkpoint.foreign.tokenizer_values import check_tokenizer, check_tokenizer_files, repeats_repetitions
from edgemoe.demo import demo_folder

PUBLISHED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"(?:\r?\n)+(?!\r?\n)",
)
"""Expressions that published tokenizers split texts by, or much like them."""


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(*texts: bytes) -> dict[str, str]:
    table = (8).to_bytes(4, "little") + bytes(8) + b"\0".join(texts) + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFC"},
        replace("▁", String=" "),
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")]},
        {"type": "Sequence", "normalizers": [replace(" ", Regex=r"\s{2,}"), charsmap(b"ab", b"c" * 40)]},
    ],
)
def test_usual_normalizers_are_accepted(normalizer: Any) -> None:
    check_tokenizer({"normalizer": normalizer, "model": {"max_input_chars_per_word": 100}}, "it")


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("x" * 1000, Regex=".")] * 3}}, "times as long"),
        ({"normalizer": replace("x" * 1000, String="a")}, "1000 times as long, and 64 is the limit"),
        ({"decoder": {"type": "Sequence", "decoders": [replace("x" * 9, String="a")] * 4}}, "times as long"),
        ({"normalizer": {"type": "Sequence", "normalizers": [charsmap(b"y" * 5000)]}}, "times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 2000}}, "prepends more"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+b"}}}, "repeats a repetition"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a" * 20_000}}}, "expression of 20000"),
        ({"model": {"max_input_chars_per_word": 10**9}}, "max_input_chars_per_word"),
    ],
)
def test_others_are_refused(part: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        check_tokenizer(part, "it")


def test_repeated_repetitions_are_found() -> None:
    for expression in ("(a+)+", "(a*)*b", "((a|b)+c?)+", "(?:x{2,})*", "([a-z]+\\s?){1,}", "(?i:(a+))+"):
        assert repeats_repetitions(expression), expression
    for expression in (*PUBLISHED, "(ab)+", "a+b+", "(a+)?", "(a+){1,3}", "[(a+)+]", r"\(a+\)+", "(a++)+", ""):
        assert not repeats_repetitions(expression), expression


def test_files_of_a_tokenizer(tmp_path: Path) -> None:
    check_tokenizer_files(demo_folder())
    (tmp_path / "notes.json").write_text("[" * 1000)
    check_tokenizer_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 1000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json cannot be read as JSON"):
        check_tokenizer_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    (tmp_path / "chat_template.jinja").write_text("x" * 600_000)
    with pytest.raises(CheckpointError, match=r"chat_template.jinja has 600000 bytes"):
        check_tokenizer_files(tmp_path)


def test_a_text_is_tokenized_as_far_as_it_may_fit() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    seen = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return [0] * (len(text) // 100)

    text = "word " * 100_000
    check_text_length(text[:SMALL_TEXT], 1, tokenizer, encode)
    check_text_length(text, None, tokenizer, encode)
    check_text_length(text, 64, None, encode)
    assert seen == []
    check_text_length(text, 5000, tokenizer, encode)
    assert seen == [80_000, 320_000]
    with pytest.raises(RequestError, match=r"500000 characters, of which the first 65536 are 655 tokens"):
        check_text_length(text, 655 - SLACK - 1, tokenizer, encode)
    with pytest.raises(RequestError, match=r"has 2000000 characters, and 64 tokens of context hold 1048576 at most"):
        check_text_length("x" * 2_000_000, 64, tokenizer, encode)


def test_a_prompt_far_too_long_is_refused_and_a_long_one_is_counted() -> None:
    with Engine.load(None, state_folder="none", device="cpu") as engine:
        for prompt in ("far too long " * 400_000, [{"role": "user", "content": "far too long " * 400_000}]):
            with pytest.raises(RequestError, match="characters.*shorten the prompt, or raise context="):
                engine.generate(prompt)
        with pytest.raises(RequestError, match=r"tokens and the context 2048"):
            engine.generate("a b " * 3000)
