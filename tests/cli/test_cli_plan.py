from __future__ import annotations

import json

import pytest
from fake_engine import FakeEngine, FakeFactory, FakePlan

from edgemoe.cli.main import main


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


def test_a_simulated_link_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    factory = FakeFactory(FakeEngine(plan=FakePlan(simulation="simulation: a link of 2 GB/s")))
    assert main(["plan", "-m", "x", "--link-gbps", "2"], engine=factory) == 0
    assert factory.asked == [{"model": "x", "link_gbps": 2.0}]
    assert capsys.readouterr().err == "edgemoe: simulation: a link of 2 GB/s\n"
