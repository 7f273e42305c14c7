"""What is fetched from a hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.support.loopback_hub import COMMIT, REPOSITORY, Hub
from bench.support.zoo import make
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import edit


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    with quiet_transformers():
        make("mixtral", folder, max_shard_size="300KB")
    served = Hub(folder)
    yield served
    served.close()


def asked(hub: Hub, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`edgemoe plan` of the repository, with an empty cache of the hub's files at first."""
    environment = os.environ | hub.environment(tmp_path / "hf")
    command = [
        sys.executable,
        "-c",
        "import sys; from edgemoe.cli.main import main; sys.exit(main())",
        "plan",
        "-m",
        REPOSITORY,
        "--device",
        "cpu",
        *more,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_of_several_copies_of_the_weights_one_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """unslothai/unsloth#11227, exo-explore/exo#1800."""
    (hub.folder / "original").mkdir()
    for copy in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        shutil.copy(next(hub.folder.glob("model-*.safetensors")), hub.folder / copy)
    (hub.folder / "original" / "params.json").write_text("{}")
    (hub.folder / "old-00001-of-00002.safetensors").write_bytes(b"left behind")
    done = asked(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.fetched[0] == "config.json"
    shards = {file.name for file in hub.folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    rest = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert set(hub.fetched) == shards | rest
    assert len(hub.fetched) == len(set(hub.fetched)), "each once"


def test_what_is_in_the_cache_needs_no_connection(hub: Hub, tmp_path: Path) -> None:
    assert asked(hub, tmp_path).returncode == 0
    hub.fetched.clear()
    assert asked(hub, tmp_path, "--offline").returncode == 0
    hub.close()
    done = asked(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.fetched == []


@pytest.mark.parametrize("reference", [None, f"{COMMIT}\n"])
def test_the_cache_may_not_say_which_commit_a_branch_is_at(reference: str | None, hub: Hub, tmp_path: Path) -> None:
    """huggingface/huggingface_hub#4492: copied, filled by commit, or written by an editor."""
    assert asked(hub, tmp_path).returncode == 0
    cache = tmp_path / "hf" / "hub" / "models--org--model"
    shutil.rmtree(cache / "refs")
    if reference is not None:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(reference)
    done = asked(hub, tmp_path, "--offline")
    assert done.returncode == 0, done.stderr
    shutil.copytree(cache / "snapshots" / COMMIT, cache / "snapshots" / COMMIT[::-1])
    done = asked(hub, tmp_path, "--offline")
    assert done.returncode == (3 if reference is None else 0), "of two snapshots none is meant"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "nosuch"}}, "is quantised (nosuch)"),
        ({"model_type": "llama"}, "is not a Mixture-of-Experts model"),
        ({"model_type": "nosuch"}, "is of the family nosuch, unknown"),
    ],
)
def test_what_cannot_be_run_is_refused_before_its_weights_are_fetched(
    change: dict[str, Any], said: str, hub: Hub, tmp_path: Path
) -> None:
    edit(hub.folder / "config.json", lambda config: config.update(change))
    done = asked(hub, tmp_path)
    assert done.returncode == 3
    assert said in done.stderr
    assert hub.fetched == ["config.json"]
    assert len(done.stderr.splitlines()) == 1
