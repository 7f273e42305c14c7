from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from edgemoe import found_model
from edgemoe.checkpoint.catalog import CatalogEntry
from edgemoe.cli.main import main
from edgemoe.demo import demo_folder
from edgemoe.errors import PlanError

Made = namedtuple("Made", "slots experts")


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_model_that_runs_and_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(demo_folder())
    assert main(["models", model, str(tmp_path / "none")]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["model", "family", "experts", "size", "runs", "here"]
    assert first.startswith(model)
    assert first.endswith(" yes")
    assert second.endswith("no: does not exist")
    assert main(["models", model, str(tmp_path / "none"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert [(each["model"], each["runs"], each["resident"]) for each in found] == [
        (model, True, 1), (str(tmp_path / "none"), False, None),
    ]  # fmt: skip
    assert found[1]["reason"] == "does not exist"


def test_nothing_found_is_said_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(tmp_path)]) == 0
    said = "edgemoe: no checkpoints in the Hugging Face cache, nor in the folders given\n"
    assert capsys.readouterr() == ("", said)
    assert main(["models", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"models": []}
    assert err == said


def test_the_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blueprints: dict[str, Any] = {"half": Made(50, 100), "whole": Made(4, 4), "little": Made(1, 1000), "large": None}

    def find(folders: list[str], *, hub_cache: bool) -> Iterator[CatalogEntry]:
        assert folders == []
        for name in blueprints:
            yield CatalogEntry(f"org/{name}", 3 << 30, "mixtral", ("Q4_K", "Q6_K"), blueprint=name)  # type: ignore[arg-type]
        yield CatalogEntry("org/dense", 10, None, problem="partly downloaded: give it as model= to fetch the rest")

    def make_plan(blueprint: str, config: object) -> Any:
        if blueprints[blueprint] is None:
            raise PlanError("org/large needs at least 9 GiB free: give a smaller context=")
        return blueprints[blueprint]

    monkeypatch.setattr(found_model, "find", find)
    monkeypatch.setattr("edgemoe.found_model.make_plan", make_plan)
    assert main(["models"]) == 0
    assert capsys.readouterr().out == (
        "model       family   experts     size     runs here\n"
        "org/half    mixtral  Q4_K, Q6_K  3.0 GiB  yes, 50 % of the experts in memory\n"
        "org/whole   mixtral  Q4_K, Q6_K  3.0 GiB  yes\n"
        "org/little  mixtral  Q4_K, Q6_K  3.0 GiB  yes, 1 % of the experts in memory\n"
        "org/large   mixtral  Q4_K, Q6_K  3.0 GiB  no: needs at least 9 GiB free: give a smaller --ctx-size\n"
        "org/dense   -        -           10 B     no: partly downloaded: give it with -m to fetch the rest\n"
    )


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(
        found_model, "find", lambda folders, hub_cache: iter([CatalogEntry("a", 1, None, problem="does not exist")])
    )
    assert main(["models"]) == 0
    assert "│" in capsys.readouterr().out
