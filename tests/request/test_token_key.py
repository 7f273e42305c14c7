"""Keys sort and share prefixes like the token sequences that they stand for."""

from __future__ import annotations

import random

import pytest

from edgemoe.request.token_key import TOKEN_NBYTES, shared_tokens, token_key

TRICKY = [0, 1, 127, 128, 255, 256, 257, 65535, 65536, 262143, 2**31, 2**32 - 1]
"""Ids that detect a wrong byte order or a sign."""


def random_sequences(seed: int, count: int = 60) -> list[list[int]]:
    """Sequences with many common prefixes, some of them empty or a prefix of another."""
    draw = random.Random(seed)
    sequences: list[list[int]] = [[]]
    for _ in range(count):
        base = draw.choice(sequences)
        kept = base[: draw.randint(0, len(base))]
        sequences.append(kept + [draw.choice(TRICKY) for _ in range(draw.randint(0, 6))])
    return sequences


def shared_by_counting(one: list[int], other: list[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


@pytest.mark.parametrize("seed", range(5))
def test_keys_sort_as_token_sequences_do(seed: int) -> None:
    sequences = random_sequences(seed)
    assert sorted(sequences) == sorted(sequences, key=token_key)


@pytest.mark.parametrize("seed", range(5))
def test_shared_tokens_agree_with_counting(seed: int) -> None:
    sequences = random_sequences(seed)
    for one in sequences:
        for other in sequences:
            assert shared_tokens(token_key(one), token_key(other)) == shared_by_counting(one, other)


def test_a_token_that_differs_in_one_byte_only_is_not_shared() -> None:
    """Only whole tokens count."""
    assert shared_tokens(token_key([7, 0x01020304]), token_key([7, 0x01020305])) == 1
    assert shared_tokens(token_key([0x01020304]), token_key([0x02020304])) == 0


def test_a_token_has_the_same_bytes_at_every_position() -> None:
    assert token_key([]) == b""
    assert len(token_key(TRICKY)) == TOKEN_NBYTES * len(TRICKY)
    assert token_key(TRICKY[:5]) + token_key(TRICKY[5:]) == token_key(iter(TRICKY))


@pytest.mark.parametrize("differs", [0, 1, 499_999, 999_999])
def test_one_difference_in_a_million_tokens_is_found(differs: int) -> None:
    long = list(range(1_000_000))
    other = long[:differs] + [5_000_000] + long[differs + 1 :]
    assert shared_tokens(token_key(long), token_key(other)) == differs
