"""The parsers of requests, fed with mutations of what they take."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.guest.mutator import Mutator
from bench.guest.parser import Parser
from bench.guest.parsers.requests import PARSERS

CASES = 800


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_parser_takes_what_it_is_for(parser: Parser, tmp_path: Path) -> None:
    read = 0
    for sample in parser.samples(tmp_path):
        try:
            parser.parse(sample, tmp_path)
            read += 1
        except parser.errors:
            continue
    assert read >= 1


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_parser_takes_or_refuses_anything(parser: Parser, tmp_path: Path) -> None:
    mutator = Mutator(parser.samples(tmp_path), 1, text=parser.text)
    refusals = []
    for _ in range(CASES):
        try:
            parser.parse(mutator.draw(), tmp_path)
        except parser.errors as refusal:
            refusals.append(str(refusal))
    assert refusals
    assert max(map(len, refusals)) < 2000
