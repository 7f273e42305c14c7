"""The examples that ship are ones the command takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemoe.cli.main import main
from edgemoe.cli.run.requests import RequestLine, RequestReader
from edgemoe.cli.run.source import Source
from edgemoe.sampling import Sampling
from tests.support.fake_engine import FakeEngine, FakeFactory

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("name", "count"), [("prompts.jsonl", 12), ("prompts.txt", 5)])
def test_every_line_is_a_request(name: str, count: int, tmp_path: Path) -> None:
    source = Source.open(str(EXAMPLES / name))
    entries = RequestReader(Sampling()).read(source.lines(), jsonl=source.is_jsonl)
    requests = [entry.request for entry in entries]
    source.close()
    assert all(isinstance(request, RequestLine) for request in requests)
    assert len({request.custom_id for request in requests}) == count
    engine = FakeEngine()
    assert main(["run", str(EXAMPLES / name), "-o", str(tmp_path / "out")], engine=FakeFactory(engine)) == 0
    assert len(engine.prompts) == count


def test_the_library_example_is_short() -> None:
    assert len((EXAMPLES / "library.py").read_text().splitlines()) < 40
