"""Token ids as callers give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from edgemoe.checkpoint.prompts.prompt_limits import check_room
from edgemoe.errors import RequestError
from edgemoe.values import shown

FORMS = "a prompt must be a text, a sequence of token ids, or a list of messages"
BYTES = (bytes, bytearray, memoryview)


def read_token_ids(prompt: Any, context: int | None = None) -> list[int]:
    """`prompt`, a sequence of integers or an array of numpy or PyTorch of one dimension, as Python's integers.

    Raises RequestError for anything else, and for more tokens than a `context` of so many has room for.
    """
    is_array = hasattr(prompt, "tolist") and hasattr(prompt, "ndim") and not isinstance(prompt, BYTES)
    if is_array and prompt.ndim != 1:
        raise RequestError(
            f"an array of token ids must have one dimension, not {prompt.ndim}: give one prompt, such as array[0]"
        )
    if not is_array and (isinstance(prompt, (str, *BYTES, Mapping)) or not isinstance(prompt, Sequence)):
        mend = "decode it to a text" if isinstance(prompt, BYTES) else "give one of these"
        raise RequestError(f"{FORMS}, not {shown(prompt)}: {mend}")
    if context is not None:
        check_room(len(prompt), context)
    ids = prompt.tolist() if is_array else list(prompt)
    for index, token in enumerate(ids):
        if type(token) is int:
            continue
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(f"{FORMS}, but its element {index} is {shown(token)}: give integers as token ids")
        ids[index] = int(token)
    return ids


def check_token_ids(tokens: Iterable[int], vocabulary: int, where: str) -> None:
    """Raises RequestError, which begins with `where`, for an id that is none of `vocabulary` ids."""
    outside = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise RequestError(f"{where} token id {shown(outside)}, outside the vocabulary of {vocabulary}: check the ids")
