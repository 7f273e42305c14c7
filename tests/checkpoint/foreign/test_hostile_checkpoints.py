"""Checkpoints that are broken on purpose are refused in one sentence, at once, and without taking memory."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from bench.field.case import tiny
from bench.guest.fuzz import refuse
from bench.guest.hostile_checkpoints import Hostile, cases
from edgemoe import CheckpointError, Engine
from edgemoe.checkpoint.blueprint import open_blueprint

MAX_SECONDS = 10.0
"""Two seconds on a machine that does nothing else."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("hostile") / "model", "mixtral")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_the_checkpoint_is_sound_before_it_is_broken(folder: Path) -> None:
    with Engine.load(folder, state_folder="none", device="cpu") as engine:
        assert engine.tokenize([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if number % 5 == 0 else pytest.mark.slow)
        for number, case in enumerate(cases())
    ],
)
def test_a_broken_checkpoint_is_refused(case: Hostile, folder: Path) -> None:
    case.change(folder)
    begun = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        refuse(folder, case)
    said = str(caught.value)
    assert str(folder) in said
    assert "\n" not in said
    assert len(said) < 1000
    assert time.monotonic() - begun < MAX_SECONDS


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a" * 5000, "File name too long"),
        ("/" + "b/" * 2500, "ile name too long"),
        ("~nosuchuser/x", "home"),
        ("a\0b", "\\x00"),
    ],
)
def test_paths_that_no_system_has(name: str, part: str) -> None:
    with pytest.raises(CheckpointError, match="is no folder|names no model") as caught:
        open_blueprint(name, offline=True)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read .*give it to this user"):
        open_blueprint(folder)


def test_a_layers_number_is_held_against_the_files(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3000'))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 3000, and the files have tensors of 8 layers"):
        open_blueprint(folder)


def test_the_field_of_a_word_that_transformers_does_not_know_is_named(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"nosuch"'))
    with pytest.raises(CheckpointError, match=r"does not describe a mixtral model \(hidden_act is 'nosuch'\)"):
        open_blueprint(folder)
