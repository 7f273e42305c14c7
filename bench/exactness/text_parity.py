"""`text-parity`: the streamed text of random replies against the tokenizer's text of all ids, for every decoder."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from bench.measurement import BaseSize, Measurement
from edgemoe.quiet import quiet_transformers
from edgemoe.request.detokenizer import Detokenizer
from edgemoe.request.token_texts import TokenTexts

NAME = "text-parity"
BAR = "prompt and streamed text equal the text of all ids, byte for byte"
SPECIAL = ("<s>", "</s>", "<|end|>")
PIECES = (
    "▁The", "▁the", "▁", "▁▁", "the", "ing", "##ing", "##s", "s</w>", "the</w>", ".", ",", "!", "?", "'", "n't", "'s",
    "do", "not", " ", "  ", "\n", "Ġthe", "Ġ", "Ċ", "é", "日", "本", "Ã©", "æĹ", "¥", "Ľ", "🙂",
    "\N{REPLACEMENT CHARACTER}", "a", "b", "1", "<pad>", "|", "ðŁ", "Ĥ", "âĤ", "¬",
)  # fmt: skip
"""What decoders treat differently: signs for spaces, suffixes, parts of characters, punctuation."""
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS: dict[str, Any] = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "byte fallback": decoders.ByteFallback(),
    "fused": decoders.Fuse(),
    "replaced": decoders.Replace("▁", " "),
    "metaspace always": decoders.Metaspace(prepend_scheme="always"),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "WordPiece": decoders.WordPiece(),
    "WordPiece without clean-up": decoders.WordPiece(cleanup=False),
    "BPE": decoders.BPEDecoder(),
    "CTC": decoders.CTC(),
    "CTC without clean-up": decoders.CTC(cleanup=False),
    "Gemma": decoders.Sequence(LLAMA),
    "Llama": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "fused and stripped": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    "stripped": decoders.Strip(" ", 1, 0),
}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The sequences for each tokenizer, and whether transformers' own classes are among these."""

    sequences: int = 2000
    classes: bool = True


FULL, SMALL = Size(), Size(small=True, sequences=40, classes=False)


def run(size: Size = FULL) -> Measurement:
    """Sequences of ids, a beginning of each as the prompt and the rest token by token."""
    wrong: dict[str, list[Any]] = {}
    count = 0
    for name, tokenizer in tokenizers(size):
        found = differing(tokenizer, random.Random(name), size.sequences)
        count += 1
        if found:
            wrong[name] = [len(found), found[0]]
            print(f"{name}: {len(found)} differ, as {found[0]}", flush=True)
    value = {"tokenizers": count, "sequences": size.sequences, "wrong": wrong}
    return Measurement(NAME, value, BAR, not wrong)


def tokenizers(size: Size) -> Iterator[tuple[str, Any]]:
    """A tokenizer for each decoder, and one of each of transformers' classes that can be built from a vocabulary."""
    for name, decoder in DECODERS.items():
        yield name, with_decoder(decoder)
    if size.classes:
        yield from of_classes()


def vocabulary() -> dict[str, int]:
    """Tokens by themselves, special ones, pieces and single bytes, and the characters that stand for bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [chr(letter) for letter in range(0xA1, 0x100)]
    return {token: number for number, token in enumerate(dict.fromkeys((*SPECIAL, *PIECES, *bytes_, *letters)))}


def with_decoder(decoder: Any) -> Any:
    """transformers' tokenizer over the vocabulary with a decoder of `tokenizers`."""
    made = Tokenizer(models.WordLevel(vocabulary(), unk_token="<s>"))
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def of_classes() -> Iterator[tuple[str, Any]]:
    """A tokenizer of every class that transformers names for a model, where it can be made from a vocabulary."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    for name in sorted({str(each) for each in TOKENIZER_MAPPING_NAMES.values() if each}):
        with quiet_transformers():
            try:
                made = _built(tokenizer_class_from_name(name))
            except Exception:
                # It wants files, another kind of vocabulary, or a library that is not installed.
                continue
        if made is not None:
            yield name, made


def _built(kind: Any) -> Any:
    known: Mapping[str, inspect.Parameter] = inspect.signature(kind.__init__).parameters
    if "vocab" not in known:
        return None
    words = vocabulary()
    given: dict[str, Any] = {"vocab": words, "merges": []} if "merges" in known else {"vocab": words}
    try:
        made = kind(**given)
    except Exception:
        made = kind(vocab=[(word, -1.0) for word in words])
    return made if made.decode([len(words) // 2]) is not None else None


def differing(tokenizer: Any, draw: random.Random, sequences: int) -> list[tuple[str, str]]:
    """The whole text and the streamed one, of every sequence where they differ."""
    texts = TokenTexts(tokenizer)
    kinds = _kinds(tokenizer)
    found = []
    for _ in range(sequences):
        ids = [draw.choice(draw.choice(kinds)) for _ in range(draw.randint(1, 60))]
        at = draw.randint(0, len(ids) - 1)
        whole, streamed = _text(tokenizer, texts.special, ids), _streamed(texts, ids[:at], ids[at:])
        # A prompt that ends inside of a character has another text than the same tokens among others.
        before = os.path.commonprefix([_text(tokenizer, texts.special, ids[:at]), whole])
        if before + streamed != whole:
            found.append((whole, before + streamed))
    return found


def _kinds(tokenizer: Any) -> list[list[int]]:
    """Ids to choose from: all, those of the pieces, those of bytes, and special ones."""
    words: dict[str, int] = tokenizer.get_vocab()
    chosen: list[Callable[[str], bool]] = [
        lambda word: True,
        lambda word: word in PIECES,
        lambda word: word in PIECES,
        lambda word: word.startswith("<0x"),
        lambda word: word in ("<0xE6>", "<0x97>", "<0xA5>", "<0x41>"),
        lambda word: word in SPECIAL,
    ]
    kinds = [[number for word, number in words.items() if choose(word)] for choose in chosen]
    return [kind for kind in kinds if kind]


def _text(tokenizer: Any, special: frozenset[int], ids: list[int]) -> str:
    # Some decoders panic where nothing is left to decode.
    if special.issuperset(ids):
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _streamed(texts: TokenTexts, prompt: list[int], reply: list[int]) -> str:
    detokenizer = Detokenizer(texts, prompt)
    return "".join([*map(detokenizer.push, reply), detokenizer.finish()])
