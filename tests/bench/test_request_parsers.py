"""The parsers of requests, fed with mutations of what they take."""

from __future__ import annotations

import random

import pytest

from bench.guest.parsers.requests import PARSERS, SEEDS
from edgemoe.errors import EdgeMoEError

CASES = 800
SPLICES = [
    b"null", b"true", b"-1", b"1e999", b"NaN", b"1" * 401, b"1" * 5000, b"[" * 2000, b'{"a":' * 2000, b'"\\ud800"',
    b"\xff", b"\0", b"{}", b"[]", b'""', b'"bytes:x"', b'"set:ab"', b'"half:a"', b"\n", b"\\", b'"', b"0.5",
    b"9223372036854775808",
]  # fmt: skip


def mutated(seed: bytes, draw: random.Random) -> bytes:
    """`seed` with a few pieces cut out, doubled, or replaced by what is hard to read."""
    data = seed
    for _ in range(draw.randint(1, 4)):
        first = draw.randrange(len(data) + 1)
        last = min(len(data), first + draw.choice([0, 1, 2, 5, 20]))
        piece = draw.choice([*SPLICES, data[first:last] * 2, b"", bytes([draw.randrange(256)])])
        data = data[:first] + piece + data[last:]
    return data


def valued(seed: bytes, draw: random.Random) -> bytes:
    """`seed` with a value of its JSON replaced."""
    places = [place for place in range(len(seed)) if seed[place : place + 2] in (b": ", b", ", b"[{", b'["')]
    place = draw.choice(places) + 1 if places else 0
    end = next((at for at in range(place + 1, len(seed)) if seed[at : at + 1] in (b",", b"}", b"]")), len(seed))
    return seed[:place] + b" " + draw.choice(SPLICES) + seed[end:]


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_takes_what_it_is_for(name: str) -> None:
    read = 0
    for seed in SEEDS[name]:
        try:
            PARSERS[name](seed)
            read += 1
        except EdgeMoEError:
            continue
    assert read >= 1


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_takes_or_refuses_anything(name: str) -> None:
    draw = random.Random(name)
    refusals = []
    for _ in range(CASES):
        data = draw.choice([mutated, valued])(draw.choice(SEEDS[name]), draw)
        try:
            PARSERS[name](data)
        except EdgeMoEError as refusal:
            refusals.append(str(refusal))
    assert refusals
    assert max(map(len, refusals)) < 2000
