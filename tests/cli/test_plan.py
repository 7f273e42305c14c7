from __future__ import annotations

import json
import re

import pytest

from edgemoe.cli.main import main
from edgemoe.demo import demo_folder
from tests.support.fake_engine import FakeEngine, FakeFactory, FakePlan


def test_the_plan_as_text(factory: FakeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", "some/model", "-c", "100", "--expert-cache", "40%"], engine=factory) == 0
    assert capsys.readouterr() == (
        "what           how much  where and why\n"
        "experts        1.0 GiB   memory\n"
        "dense weights  96 MiB    memory, always resident\n",
        "",
    )
    assert factory.asked == [{"model": "some/model", "context": 100, "expert_cache": "40%"}]


def test_the_plan_as_json(factory: FakeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json"], engine=factory) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"model": "fake", "context": 512}
    assert "the small demo model that ships with edgemoe is used" in err
    assert factory.asked == [{"model": None}]


@pytest.mark.parametrize(
    ("line", "what", "then", "why"),
    [
        ("", "mtp and ngram", ", ", "while it pays, trees of at most 16 tokens"),
        ("--speculate off", "off", ": ", "asked for"),
        (
            "--speculate ngram+self --draft-shape chain --draft-nodes 4",
            "ngram and self", ", ", "always, chains of at most 4 tokens",
        ),
    ],
)  # fmt: skip
def test_what_will_draft_is_part_of_the_plan(
    line: str, what: str, then: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "-m", str(demo_folder()), *line.split()]
    assert main(asked) == 0
    rows = [re.split("  +", row) for row in capsys.readouterr().out.splitlines()]
    assert ["speculation", what, why] in rows
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speculation"] == what + then + why


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--draft-nodes 257", "--draft-nodes 257 is not possible: give a number from 1 to 256"),
        ("--draft-depth 1000", "--draft-depth 1000 is not possible: give a number from 1 to 256"),
        ("--speculate model", "--speculate model needs a second checkpoint: name it with --draft-model"),
    ],
)
def test_drafts_that_are_not_possible_are_refused(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", str(demo_folder()), *line.split()]) == 4
    assert capsys.readouterr() == ("", f"edgemoe: error: {said}\n")


def test_a_simulated_link_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    factory = FakeFactory(FakeEngine(plan=FakePlan(simulation="simulation: a link of 2 GB/s")))
    assert main(["plan", "-m", "x", "--link-gbps", "2"], engine=factory) == 0
    assert factory.asked == [{"model": "x", "link_gbps": 2.0}]
    assert capsys.readouterr().err == "edgemoe: simulation: a link of 2 GB/s\n"
