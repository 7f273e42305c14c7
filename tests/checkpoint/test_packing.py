from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgemoe import Engine, Sampling
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.checkpoint.checkpoint import INDEX
from edgemoe.checkpoint.packed import packing
from edgemoe.errors import CheckpointError, PlanError
from tests.support.checkpoints import Zoo

GREEDY = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPT = [5, 60, 70, 80, 9]


def reply(model: Path, **settings: Any) -> tuple[int, ...]:
    with Engine.load(model, state_folder="none", expert_cache="40%", **settings) as engine:
        return engine.generate(PROMPT, GREEDY).token_ids


@pytest.mark.parametrize("experts", ["int8", "nf4", "fp4", "int4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_packed_checkpoint_replies_as_the_source_quantised_while_loading(
    family: str, experts: str, zoo: Zoo, tmp_path: Path
) -> None:
    source = zoo(family)
    assert packing.pack(open_blueprint(source, experts=experts), tmp_path / "packed")
    assert open_blueprint(tmp_path / "packed").expert_formats == (experts,)
    assert reply(tmp_path / "packed") == reply(source, experts=experts)
    assert packing.verify(tmp_path / "packed") == []


@pytest.mark.parametrize(("experts", "dense"), [("nf4", "nf4"), ("int8", "int8"), ("native", "int8"), ("fp4", "nf4")])
def test_other_layers_are_packed_as_well(experts: str, dense: str, zoo: Zoo, tmp_path: Path) -> None:
    source = zoo("qwen3_moe")
    blueprint = open_blueprint(source, experts=experts, dense=dense)
    packing.pack(blueprint, tmp_path / "packed")
    packed = open_blueprint(tmp_path / "packed")
    assert {each.name for each in packed.packed_modules} == {each.name for each in blueprint.packed_modules} != set()
    assert reply(tmp_path / "packed") == reply(source, experts=experts, dense=dense)


def test_formats_of_two_ways_of_packing_do_not_go_together(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give dense=native"):
        packing.pack(open_blueprint(zoo("qwen3_moe"), experts="int4", dense="int8"), tmp_path / "packed")
    with pytest.raises(CheckpointError, match="give a format"):
        packing.pack(open_blueprint(zoo("qwen3_moe")), tmp_path / "packed")


def test_a_packed_checkpoint_is_not_packed_or_quantised_again(zoo: Zoo, tmp_path: Path) -> None:
    packing.pack(open_blueprint(zoo("qwen3_moe"), experts="nf4"), tmp_path / "packed")
    with pytest.raises(CheckpointError, match="leave out experts="):
        open_blueprint(tmp_path / "packed", experts="int8")


def test_what_is_there_is_not_done_again_and_nothing_else_is_overwritten(zoo: Zoo, tmp_path: Path) -> None:
    blueprint = open_blueprint(zoo("qwen3_moe"), experts="nf4")
    assert packing.pack(blueprint, tmp_path / "packed")
    assert not packing.pack(blueprint, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="is not empty"):
        packing.pack(open_blueprint(zoo("qwen3_moe"), experts="int8"), tmp_path / "packed")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        packing.pack(blueprint, tmp_path / "other")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["notes"]


def test_a_damaged_file_is_found(zoo: Zoo, tmp_path: Path) -> None:
    packing.pack(open_blueprint(zoo("qwen3_moe"), experts="nf4"), tmp_path / "packed")
    file = next((tmp_path / "packed").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert packing.verify(tmp_path / "packed") == [file.name]


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(PlanError, match="give another folder"):
        packing.pack(open_blueprint(zoo("qwen3_moe"), experts="nf4"), tmp_path / "packed")


def test_an_interrupted_packing_goes_on_to_the_same_files(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SHARD_NBYTES", 20_000)
    blueprint = open_blueprint(zoo("qwen3_moe"), experts="int4")
    packing.pack(blueprint, tmp_path / "whole")
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert len(json.loads(files[INDEX])["metadata"]["sha256"]) > 3
    generator, copied = random.Random(5), packing._copied
    starts = 0
    while True:
        left = generator.randrange(2, 12)

        def fail(path: Path, entry: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return copied(path, entry)  # type: ignore[arg-type]

        monkeypatch.setattr(packing, "_copied", fail)
        starts += 1
        try:
            packing.pack(blueprint, tmp_path / "again")
            break
        except KeyboardInterrupt:
            assert (tmp_path / "again" / packing.BEGUN).exists()
    assert starts > 2
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == files


def test_a_kill_before_anything_was_kept_leaves_a_folder_to_go_on_with(zoo: Zoo, tmp_path: Path) -> None:
    blueprint = open_blueprint(zoo("qwen3_moe"), experts="nf4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{packing.BEGUN}.part").write_text('{"identity')
    assert packing.pack(blueprint, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.part"))
    assert packing.verify(tmp_path / "out") == []


def test_the_command_survives_being_killed(zoo: Zoo, tmp_path: Path) -> None:
    run = "import sys; from edgemoe.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "pack", str(zoo("qwen3_moe")), str(tmp_path / "out")]
    command += ["--experts", "nf4", "--verify"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "checksums are right" in again.stdout
    assert "lossy" in again.stderr
    assert reply(tmp_path / "out") == reply(zoo("qwen3_moe"), experts="nf4")
