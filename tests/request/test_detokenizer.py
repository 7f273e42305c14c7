"""Streamed text: whole characters only, nothing lost, no part of a stop text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench.support.byte_tokenizer import byte_tokenizer
from edgemoe.request.detokenizer import UNFINISHED, Detokenizer, StopTexts
from edgemoe.request.token_texts import TokenTexts

TEXTS = [
    "plain words, one after the other",
    "Grüße aus Köln – naïve façade",
    "日本語のテキストと한국어와中文",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "  leading and   inner    spaces\n\n\tand lines ",
    "a\u0301 e\u0308 combining, \u200dzero width\u200b, Ω≈ç√∫˜µ≤≥÷",
]


def merged_tokenizer() -> Tokenizer:
    """A byte-level BPE whose merges join some bytes of a character, and characters with their neighbours."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"bytes": wrapped(byte_tokenizer()), "merged": wrapped(merged_tokenizer())}


def streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_make_up_the_text_and_no_character_is_split(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids) == text
    assert not any(UNFINISHED in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = Detokenizer(TokenTexts(tokenizer))
    ids = tokenizer.encode("x€y", add_special_tokens=False)
    assert [detokenizer.push(token) for token in ids] == ["x", "", "", "€", "y"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_at_the_end_is_decoded_as_the_decoder_does() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("x€", add_special_tokens=False)[:-1]
    pieces = streamed(tokenizer, ids)
    assert pieces == ["x", "", "", UNFINISHED]
    assert "".join(pieces) == decoded(tokenizer, ids)


def test_bytes_that_cannot_become_a_character_are_released() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = [3 + 0x80, 3 + ord("a"), 3 + 0xE2, 3 + 0x82, 3 + ord("b")]
    pieces = streamed(tokenizer, ids)
    assert pieces == ["", UNFINISHED + "a", "", "", UNFINISHED + "b", ""]


@pytest.mark.parametrize("seed", range(30))
def test_arbitrary_bytes_are_decoded_as_a_whole(seed: int) -> None:
    """As a model with random weights writes them."""
    draw = random.Random(seed)
    tokenizer = TOKENIZERS["bytes"]
    kinds = [range(256), range(0x80, 0xC0), range(0xC0, 0x100), [*"€é".encode(), 0x41]]
    ids = [3 + draw.choice(kinds[draw.randrange(4)]) for _ in range(60)]
    assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)


def test_a_long_run_of_unfinished_bytes_loses_nothing() -> None:
    tokenizer = TOKENIZERS["bytes"]
    for lead in range(6, 14):
        ids = [3 + 0x80] * lead + [3 + byte for byte in "é!".encode()]
        assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids) == UNFINISHED * lead + "é!"


def test_a_long_run_of_unfinished_bytes_is_not_held_back() -> None:
    detokenizer = Detokenizer(TokenTexts(TOKENIZERS["bytes"]))
    assert any(detokenizer.push(3 + 0x80) for _ in range(20))


def test_special_tokens_have_no_text() -> None:
    tokenizer = TOKENIZERS["bytes"]
    special = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<eos>")
    ids = [3 + ord("a"), 2, 3 + ord("b")]
    assert "".join(streamed(special, ids)) == "ab"
    assert "".join(streamed(tokenizer, ids)) == "a<eos>b"


def stopped(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    texts = StopTexts(stops)
    out = [texts.push(piece) for piece in pieces]
    return [*out, texts.finish()], texts.found


@pytest.mark.parametrize(
    ("stops", "pieces", "given", "found"),
    [
        ([], ["ab", "cd"], ["ab", "cd", ""], False),
        (["x"], ["ab", "cxd", "e"], ["ab", "c", "", ""], True),
        (["END"], ["ab E", "N", "D more"], ["ab ", "", "", ""], True),
        (["END"], ["ab E", "N", "OUGH"], ["ab ", "", "ENOUGH", ""], False),
        (["END"], ["ab E", "N"], ["ab ", "", "EN"], False),
        (["aab"], ["a", "a", "a", "b", "c"], ["", "", "a", "", "", ""], True),
        (["abc", "bd"], ["ab", "d", "c"], ["", "a", "", ""], True),
        (["later", "sooner"], ["sooner, later"], ["", ""], True),
        (["\n\n"], ["one\n", "two\n", "\nthree"], ["one", "\ntwo", "", ""], True),
    ],
)
def test_stop_texts(stops: list[str], pieces: list[str], given: list[str], found: bool) -> None:
    assert stopped(stops, pieces) == (given, found)


@pytest.mark.parametrize("seed", range(20))
def test_the_released_text_does_not_depend_on_the_pieces(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("ab") for _ in range(40))
    stop = "".join(draw.choice("ab") for _ in range(draw.randint(1, 6)))
    pieces, left = [], text
    while left:
        count = draw.randint(1, 5)
        pieces.append(left[:count])
        left = left[count:]
    out, found = stopped([stop], pieces)
    assert "".join(out) == text.split(stop)[0]
    assert found == (stop in text)
