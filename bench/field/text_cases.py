"""Texts that lost spaces or characters, and stop texts that were seen too late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bench.field.case import CHATML, Case, edgemoe, same, speaking, words_tokenizer
from bench.support.zoo import make
from edgemoe import Engine, Sampling

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
"""How Mixtral's tokens become text."""


def _pieces(words: list[str], eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer in SentencePiece's manner."""
    own = ["<unk>", "<s>", eos, *dict.fromkeys(words)]
    made = Tokenizer(
        models.WordLevel(
            {word: at for at, word in enumerate([*own, *(f"▁w{n}" for n in range(256 - len(own)))])}, unk_token="<unk>"
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence(LLAMA)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, pad_token="<unk>")


def _streamed(folder: Path, prompt: Any, **settings: Any) -> tuple[str, list[int], str | None, list[str]]:
    """The joined text of a stream, its ids, why it ended, and its pieces."""
    with Engine.load(folder, state_folder="none", device="cpu") as engine:
        chunks = list(engine.stream(prompt, Sampling(**{"temperature": 0.0, "max_tokens": 12} | settings)))
        whole = engine.generate(prompt, Sampling(**{"temperature": 0.0, "max_tokens": 12} | settings))
    text = "".join(chunk.text for chunk in chunks)
    assert text == whole.text, f"streamed {text!r}, whole {whole.text!r}"
    return text, list(whole.token_ids), whole.finish_reason, [chunk.text for chunk in chunks]


def _leading_space(folder: Path) -> str:
    tokenizer = _pieces(["▁The", "▁capital", "▁of", "▁France", "▁is"])
    make("mixtral", folder)
    tokenizer.save_pretrained(folder)
    prompt = "The capital of France is"
    text, ids, _, _ = _streamed(folder, prompt, max_tokens=3)
    return same(prompt + text, tokenizer.decode(tokenizer.encode(prompt) + ids))


def _metaspace_one_by_one(folder: Path) -> str:
    speaking(folder, _pieces(["▁Dear", "▁I", "▁hope", "▁so"]), ["▁Dear", "▁I", "▁hope", "▁so", "</s>"])
    return same(_streamed(folder, "Dear")[0], " I hope so")


def _stop_over_borders(folder: Path) -> str:
    said = ["go", "DEF", "G", "HI", "J", "K"]
    speaking(folder, words_tokenizer(said, []), said)
    text, _, why, _ = _streamed(folder, "go", stop="DEFGHIJ")
    cut, _, length, _ = _streamed(folder, "go", stop="DEFGHIJ", max_tokens=3)
    return same((text, why, cut, length), ("", "stop", "DEFGHI", "length"))


def _stop_inside_a_token(folder: Path) -> str:
    said = ["go", "a", "j;", "b"]
    speaking(folder, words_tokenizer(said, []), said)
    text, _, why, _ = _streamed(folder, "go", stop=";")
    return same((text, why), ("aj", "stop"))


def _added_tokens_that_are_not_special(folder: Path) -> str:
    said = ["go", "<fcel>", "A", "<nl>", "<|end|>"]
    speaking(folder, words_tokenizer(said, ["<|end|>"], added=["<fcel>", "<nl>"], eos="<|end|>"), said)
    return same(_streamed(folder, "go", max_tokens=4)[0], "<fcel>A<nl>")


def _cleaned_up_spaces(folder: Path) -> str:
    said = ["go", "x", " !", "= y", " ."]
    tokenizer = words_tokenizer(said, [])
    tokenizer.clean_up_tokenization_spaces = True
    speaking(folder, tokenizer, said)
    text, ids, _, _ = _streamed(folder, "go", max_tokens=4)
    loaded = AutoTokenizer.from_pretrained(folder)
    return same("go" + text, loaded.decode([*loaded.encode("go"), *ids]))


def _emoji_by_bytes(folder: Path) -> str:
    said = ["▁go", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "</s>"]
    tokenizer = _pieces(said[:-1])
    speaking(folder, tokenizer, said)
    text, _, _, pieces = _streamed(folder, "go")
    cut, ids, _, _ = _streamed(folder, "go", max_tokens=2)
    start = tokenizer.encode("go")
    return (
        same(text, "\N{GRINNING FACE}")
        or same([piece for piece in pieces if piece], [text])
        or same("go" + cut, tokenizer.decode(start + ids))
    )


def _space_after_a_special_token(folder: Path) -> str:
    said = ["go", "<|s|>", "analysis", "done"]
    tokenizer = words_tokenizer(said, ["<|s|>"])
    speaking(folder, tokenizer, said)
    text, ids, _, _ = _streamed(folder, "go", max_tokens=3, skip_special_tokens=False)
    return same(text, tokenizer.decode(ids, skip_special_tokens=False)) or same(text, "<|s|>analysisdone")


def _special_token_as_stop_text(folder: Path) -> str:
    done = edgemoe(["chat", "-p", "What is 48 + 31?", "--temp", "0", "-n", "24", "--ignore-eos", "--stop", "<|end|>"])
    return same((done.returncode, done.stdout), (0, "48 + 31 = 79\n"))


def _stop_spelled_by_plain_tokens(folder: Path) -> str:
    said = ["assistant\n", "ok", "<", "|im_end|>", "no"]
    speaking(folder, words_tokenizer([*said, "user"], ["<|im_start|>", "<|im_end|>"], template=CHATML), said)
    text, _, why, _ = _streamed(folder, [{"role": "user", "content": "user"}], stop="<|im_end|>")
    return same((text, why), ("ok", "stop"))


CASES = [
    Case("InternLM/lmdeploy#1743", "the space between prompt and reply", _leading_space),
    Case(
        "google/sentencepiece#1043, huggingface/transformers#28776", "metaspace, token by token", _metaspace_one_by_one
    ),
    Case("vllm-project/vllm#3574", "a stop text over four tokens", _stop_over_borders),
    Case("huggingface/text-generation-inference#10", "a stop text inside of a token", _stop_inside_a_token),
    Case("EricLBuehler/mistral.rs#2319", "added tokens that are not special", _added_tokens_that_are_not_special),
    Case("huggingface/transformers#32575", "a tokenizer that cleans spaces up", _cleaned_up_spaces),
    Case("Blaizzy/mlx-vlm#1076", "an emoji in four bytes", _emoji_by_bytes),
    Case("ggml-org/llama.cpp#24008", "no space after a special token", _space_after_a_special_token),
    Case(
        "vllm-project/vllm#2123, LostRuins/koboldcpp#791", "a special token as stop text", _special_token_as_stop_text
    ),
    Case("SharpAI/SwiftLM#126", "a stop text spelled by plain tokens", _stop_spelled_by_plain_tokens),
]
