"""A tokenizer's files, checked before tokenizers builds it: its errors of memory end the process.

What a tokenizer does to a text is data: replacements one after the other, and expressions that split it. Each may
lengthen the text, so their product is limited.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgemoe.checkpoint.foreign.foreign_file import check_file, too_large
from edgemoe.checkpoint.foreign.foreign_json import MAX_CONFIG, read_object
from edgemoe.checkpoint.foreign.template_limits import MAX_SOURCE
from edgemoe.errors import CheckpointError
from edgemoe.values import shown

MAX_TOKENIZER = 96 << 20
"""Bytes of a tokenizer.json or a vocabulary: those of 262,144 tokens have 33 MB."""
TOKENIZER = "tokenizer.json"
CONFIGS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
"""Small files that transformers reads beside it."""
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json")
SUFFIXES = (".model", ".tiktoken")
"""Of vocabularies with other names."""
TEMPLATE = ".jinja"
MAX_GROWTH = 64
"""How many times as long the replacements of a tokenizer may make a text. Published ones have 3 at most."""
MAX_PREPENDED = 1000
MAX_EXPRESSION = 10_000
"""Characters of an expression that splits texts."""
MAX_WORD = 1000
"""Characters of a word that WordPiece looks up: it takes the square of them in time."""


def check_tokenizer_files(folder: Path) -> None:
    """Raises CheckpointError, with the file, for what cannot be read of a tokenizer or would take no end of memory."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        limit = _limit(name)
        if limit is None:
            continue
        size = check_file(path)
        if size > limit:
            raise too_large(path, size, limit)
        if name == TOKENIZER:
            check_tokenizer(read_object(path, limit), str(path))
        elif name in CONFIGS:
            read_object(path, limit)


def has_vocabulary_files(folder: Path) -> bool:
    """Whether `folder` has a file of tokens; a few tokenizers, such as those of bytes, need none."""
    return any(_is_vocabulary(name) for name in os.listdir(folder))


def _is_vocabulary(name: str) -> bool:
    return name == TOKENIZER or name in VOCABULARIES or name.endswith(SUFFIXES)


def _limit(name: str) -> int | None:
    """Most bytes of the file `name`; None for a file that is no part of a tokenizer."""
    if _is_vocabulary(name):
        return MAX_TOKENIZER
    if name in CONFIGS:
        return MAX_CONFIG
    return 4 * MAX_SOURCE if name.endswith(TEMPLATE) else None


def check_tokenizer(described: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError, with the part, where the tokenizer of a tokenizer.json could take all memory or time."""
    for name in ("normalizer", "decoder"):
        growth = 1.0
        for part in _parts(described.get(name)):
            growth *= _growth(part, f"{source}: {name}")
        if growth > MAX_GROWTH:
            raise CheckpointError(
                f"{source}: {name} makes a text up to {growth:.0f} times as long, and {MAX_GROWTH} is the limit: "
                "use another tokenizer"
            )
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        for part in _parts(described.get(name)):
            _check_expression(part, f"{source}: {name}")
    model = described.get("model")
    word = model.get("max_input_chars_per_word") if isinstance(model, Mapping) else None
    if isinstance(word, (int, float)) and word > MAX_WORD:
        raise CheckpointError(
            f"{source}: max_input_chars_per_word is {shown(word)}, and {MAX_WORD} is the limit: use another tokenizer"
        )


def _parts(described: Any) -> Iterator[Mapping[str, Any]]:
    """A part of a tokenizer, or those that it is a sequence of."""
    if not isinstance(described, Mapping):
        return
    yield described
    for name in ("normalizers", "pretokenizers", "decoders"):
        parts = described.get(name)
        for part in parts if isinstance(parts, list) else ():
            yield from _parts(part)


def _growth(part: Mapping[str, Any], where: str) -> float:
    """How many times as long `part` can make a text."""
    if part.get("type") == "Replace":
        content, pattern = part.get("content"), part.get("pattern")
        length = len(content) if isinstance(content, str) else 0
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
        # An expression may match single characters, or nothing between two of them.
        return max(1.0, length / max(len(replaced), 1)) if isinstance(replaced, str) else 1.0 + length
    if part.get("type") == "Prepend" and len(str(part.get("prepend"))) > MAX_PREPENDED:
        raise CheckpointError(f"{where} prepends more than {MAX_PREPENDED} characters: use another tokenizer")
    if part.get("type") == "Precompiled":
        return max(1.0, _longest_replacement(part) / MAX_GROWTH)
    return 1.0


def _longest_replacement(part: Mapping[str, Any]) -> int:
    """Bytes of the longest text that SentencePiece's table of replacements has."""
    try:
        table = base64.b64decode(str(part.get("precompiled_charsmap") or ""))
    except (binascii.Error, ValueError):
        return 0
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max((len(text) for text in texts.split(b"\0")), default=0)


def _check_expression(part: Mapping[str, Any], where: str) -> None:
    pattern = part.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if not isinstance(expression, str):
        return
    if len(expression) > MAX_EXPRESSION:
        raise CheckpointError(
            f"{where} has an expression of {len(expression)} characters, and {MAX_EXPRESSION} is the limit: "
            "use another tokenizer"
        )
    if repeats_repetitions(expression):
        raise CheckpointError(
            f"{where} has the expression {shown(expression)}, which repeats a repetition and can take no end of time: "
            "use another tokenizer"
        )


def repeats_repetitions(expression: str) -> bool:
    """Whether a group with an unbounded repetition in it is repeated without a bound itself, as in "(a+)+".

    Matching such an expression can take time exponential in the text. Possessive repetitions and atomic groups, which
    never go back, do not count.
    """
    # For each open group whether a repetition is in it; what precedes the current place, if it is a group that has one.
    groups, last, place = [False], False, 0
    while place < len(expression):
        char = expression[place]
        if char == "\\":
            place += 2
            last = False
            continue
        if char == "[":
            place = _end_of_class(expression, place)
            last = False
        elif char == "(":
            groups.append(False)
        elif char == ")":
            last = groups.pop() if len(groups) > 1 else False
            groups[-1] |= last
        elif char in "*+" or (char == "{" and _is_unbounded(expression, place)):
            possessive = expression[place + 1 : place + 2] == "+"
            if last and not possessive:
                return True
            groups[-1] |= not possessive
            place += 1 if possessive else 0
            last = False
        elif char not in "?}":
            last = False
        place += 1
    return False


def _end_of_class(expression: str, place: int) -> int:
    """The place of the bracket that ends the class of characters that begins at `place`."""
    depth = 0
    while place < len(expression):
        char = expression[place]
        if char == "\\":
            place += 1
        elif char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    return place


def _is_unbounded(expression: str, place: int) -> bool:
    """Whether the repetition "{…}" that begins at `place` has no upper bound."""
    inside = expression[place + 1 : expression.find("}", place)]
    return inside.endswith(",") and inside[:-1].isdigit()
