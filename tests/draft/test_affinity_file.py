"""The similarities of experts are computed once per checkpoint, and kept in a small file."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.checkpoint.state_folder import StateFolder
from edgemoe.draft.affinity import Affinity, compute
from edgemoe.draft.affinity_file import NAME, prepare, read, write
from edgemoe.errors import CheckpointError
from edgemoe.results import Progress
from tests.support.checkpoints import Zoo

EXPERTS = (4, 2)


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "state")


def small() -> Affinity:
    generator = torch.Generator().manual_seed(3)
    return Affinity.from_distances([torch.rand(count, count, generator=generator) for count in EXPERTS])


def same(one: Affinity | None, other: Affinity) -> bool:
    return one is not None and all(map(torch.equal, one.ranks, other.ranks))


def test_it_is_read_as_it_was_written(state: StateFolder) -> None:
    assert read(state, EXPERTS) is None
    write(state, small())
    assert same(read(state, EXPERTS), small())
    for experts in [(4,), (4, 3), (2, 4), (4, 2, 2), ()]:
        assert read(state, experts) is None, "of another model"


def test_the_file_takes_two_bytes_per_pair(state: StateFolder) -> None:
    write(state, Affinity.from_distances([torch.rand(128, 128)] * 48))
    assert state.path is not None
    assert (state.path / NAME).stat().st_size <= 2 * 128 * 128 * 48 + 8192


def damages() -> dict[str, bytes]:
    sound = {"format": "edgemoe affinity", "version": "1"}

    def file(metadata: dict[str, str] | None = sound, **changes: torch.Tensor) -> bytes:
        tensors = {str(layer): ranks for layer, ranks in enumerate(small().ranks)}
        return save(tensors | {name[1:]: value for name, value in changes.items()}, metadata=metadata)

    whole = file()
    length = int.from_bytes(whole[:8], "little")
    ranks = small().ranks[0]
    twice, off = ranks.clone(), ranks.clone()
    twice[0] = 0
    off[1] = off[1].roll(1)
    beyond = ranks.clone()
    beyond[2, (ranks[2] == 3).nonzero()[0, 0]] = 4
    return {
        "empty": b"", "short": whole[:4], "cut": whole[:-3], "longer": whole + b"1", "text": b"not a safetensors file",
        "zeros": bytes(len(whole)), "header": whole[:8] + b"{" * length + whole[8 + length :],
        "list": (2).to_bytes(8, "little") + b"[]", "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "no metadata": file(None), "version": file(sound | {"version": "2"}), "format": file({"format": "pt"}),
        "dtype": file(_0=ranks.to(torch.int32)), "shape": file(_0=ranks[:3].contiguous()), "twice": file(_0=twice),
        "not itself first": file(_0=off), "beyond": file(_0=beyond), "one more": file(_2=torch.zeros(1)),
    }  # fmt: skip


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(damage: str, state: StateFolder) -> None:
    state.write(NAME, damages()[damage])
    assert read(state, EXPERTS) is None
    write(state, small())
    assert same(read(state, EXPERTS), small())


@pytest.fixture
def checkpoint(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(zoo("mixtral"), tmp_path / "model"))


def test_it_is_computed_once_and_again_when_the_checkpoint_changes(checkpoint: Path, tmp_path: Path) -> None:
    said: list[Progress] = []
    blueprint = open_blueprint(checkpoint)
    first = prepare(blueprint, tmp_path / "state", said.append)
    assert first is not None
    assert said
    assert (first.was_kept, first.path.name, first.path.parent.parent) == (False, NAME, tmp_path / "state")
    layouts = [moe.layout for moe in blueprint.experts_modules]
    with closing(SafetensorsStore(blueprint.checkpoint.files, layouts, blueprint.records)) as store:
        assert same(compute(store), first.affinity)
    said.clear()
    again = prepare(open_blueprint(checkpoint), tmp_path / "state", said.append)
    assert again is not None
    assert (again.was_kept, again.path) == (True, first.path)
    assert same(again.affinity, first.affinity)
    assert said == []
    weights = next(checkpoint.glob("*.safetensors"))
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    changed = prepare(open_blueprint(checkpoint), tmp_path / "state", said.append)
    assert changed is not None
    assert not changed.was_kept
    assert changed.path != first.path
    assert said


def test_a_damaged_file_is_computed_again(checkpoint: Path, tmp_path: Path) -> None:
    first = prepare(open_blueprint(checkpoint), tmp_path)
    assert first is not None
    first.path.write_bytes(b"damaged")
    again = prepare(open_blueprint(checkpoint), tmp_path)
    assert again is not None
    assert not again.was_kept
    assert same(again.affinity, first.affinity)


def test_the_checkpoints_files_are_closed(checkpoint: Path, tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("the open files cannot be listed")
    prepare(open_blueprint(checkpoint), tmp_path / "state")
    assert [link for link in descriptors.iterdir() if link.resolve().parent == checkpoint.resolve()] == []


@pytest.mark.parametrize("folder", ["none", "file/state"])
def test_without_a_folder_to_keep_it_in_nothing_is_computed(folder: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    said: list[Progress] = []
    with pytest.raises(OSError, match="no folder|file"):
        prepare(open_blueprint(checkpoint), folder if folder == "none" else tmp_path / folder, said.append)
    assert said == []


def test_a_cancelled_computation_is_not_kept(checkpoint: Path, tmp_path: Path) -> None:
    assert prepare(open_blueprint(checkpoint), tmp_path / "state", cancelled=lambda: True) is None
    assert not [file for file in (tmp_path / "state").rglob("*") if file.is_file()]


def test_a_checkpoint_that_cannot_be_read_is_named(checkpoint: Path, tmp_path: Path) -> None:
    blueprint = open_blueprint(checkpoint)
    weights = next(checkpoint.glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"cannot be read any more .*changed since it was loaded"):
        prepare(blueprint, tmp_path / "state")
    assert not [file for file in (tmp_path / "state").rglob("*") if file.is_file()]


def test_a_full_disk_at_the_end_is_an_os_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(open_blueprint(checkpoint), tmp_path)


def test_the_shipped_model_is_the_default(tmp_path: Path) -> None:
    blueprint = open_blueprint()
    prepared = prepare(blueprint, tmp_path)
    assert prepared is not None
    assert prepared.path.parent.name.startswith("edgemoe-demo-")
