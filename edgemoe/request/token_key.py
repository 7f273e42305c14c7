"""Token sequences as byte strings, which compare like the sequences, at the speed of memcmp."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

TOKEN_NBYTES = 4
"""Bytes per token."""


def token_key(tokens: Iterable[int]) -> bytes:
    """`tokens` as big-endian bytes; keys sort like token sequences."""
    key = array("I", tokens)
    if sys.byteorder == "little":
        key.byteswap()
    return key.tobytes()


def shared_tokens(one: bytes, other: bytes) -> int:
    """The number of tokens in the longest common prefix of two keys."""
    low, high = 0, min(len(one), len(other)) // TOKEN_NBYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * TOKEN_NBYTES : middle * TOKEN_NBYTES] == other[low * TOKEN_NBYTES : middle * TOKEN_NBYTES]:
            low = middle
        else:
            high = middle - 1
    return low
