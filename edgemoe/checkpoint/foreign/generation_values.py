"""The values of a generation_config.json, checked: transformers takes what it says, and fails over it in a reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgemoe.checkpoint.foreign.foreign_json import read_object
from edgemoe.errors import CheckpointError
from edgemoe.values import number, shown

MAX_FACTOR = 1e4
"""Of temperatures, penalties and scales: beyond it float32 has no use for the result."""
MAX_COUNT = (1 << 31) - 1

Check = tuple[str, Callable[[Any], bool]]
"""What a value must be, and whether it is."""


def _number(least: float, most: float, *, above: bool = False) -> Check:
    def holds(value: Any) -> bool:
        read = number(value)
        return read is not None and (least < read if above else least <= read) and read <= most

    return f"a number {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}", holds


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= MAX_COUNT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(holds: Callable[[Any], bool], *, or_one: bool = False) -> Callable[[Any], bool]:
    def found(value: Any) -> bool:
        return (or_one and holds(value)) or (isinstance(value, list) and all(holds(each) for each in value))

    return found


def _is_token(value: Any) -> bool:
    # -1 stands for "none" in a few published files.
    return _is_count(value, -1)


COUNT: Check = (f"an integer from 0 to {MAX_COUNT}", _is_count)
TOKENS: Check = ("the id of a token, or a list of ids", _list_of(_is_token, or_one=True))
FLAG: Check = ("true or false", _is_bool)
CHECKS: dict[str, Check] = {
    "temperature": _number(0, MAX_FACTOR),
    "top_k": COUNT,
    "top_p": _number(0, 1, above=True),
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1, above=True),
    "epsilon_cutoff": _number(0, 1),
    "eta_cutoff": _number(0, 1),
    "top_h": _number(0, 1),
    "repetition_penalty": _number(0, MAX_FACTOR, above=True),
    "length_penalty": _number(-MAX_FACTOR, MAX_FACTOR),
    "no_repeat_ngram_size": COUNT,
    "max_length": COUNT,
    "min_length": COUNT,
    "max_new_tokens": COUNT,
    "min_new_tokens": COUNT,
    "num_beams": COUNT,
    "num_return_sequences": COUNT,
    "eos_token_id": TOKENS,
    "bos_token_id": TOKENS,
    "pad_token_id": TOKENS,
    "forced_bos_token_id": TOKENS,
    "forced_eos_token_id": TOKENS,
    "suppress_tokens": TOKENS,
    "begin_suppress_tokens": TOKENS,
    "bad_words_ids": ("a list of lists of ids", _list_of(_list_of(_is_token))),
    "do_sample": FLAG,
    "use_cache": FLAG,
    "remove_invalid_values": FLAG,
    "renormalize_logits": FLAG,
    "stop_strings": ("a text, or a list of texts", _list_of(_is_text, or_one=True)),
}
"""Fields of `generate`, and what each must be. What is not here, `check_defaults` tries."""


def check_generation(values: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError, with the field and its value, for a value that `generate` cannot be given.

    `source` is the name of the file for messages.
    """
    for name, (needed, holds) in CHECKS.items():
        value = values.get(name)
        if value is not None and not holds(value):
            raise CheckpointError(
                f"{source}: {name} is {shown(value)}, and must be {needed}: mend it, or remove the file"
            )


def check_generation_file(path: Path) -> None:
    """Raises CheckpointError as `check_generation`, and where the file cannot be read."""
    check_generation(read_object(path), str(path))
