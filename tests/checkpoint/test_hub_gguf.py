"""GGUF files of a hub's repository and of a folder, chosen by their quantisation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from bench.support.gguf_files import GgufMaker, Kind
from bench.support.loopback_hub import COMMIT, REPOSITORY, Hub
from edgemoe import CheckpointError
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.state_folder import identity
from edgemoe.quiet import quiet_transformers

OTHERS = ("mmproj-F16.gguf", "tiny-imatrix.gguf", "README.md", "config.json", "params")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's files: two quantisations, of which one is split, and what such repositories have beside them."""
    folder = tmp_path_factory.mktemp("repository")
    with quiet_transformers():
        made = GgufMaker.of_zoo("qwen3_moe", folder)
        made.write(folder / "tiny-Q8_0.gguf", Kind.Q8_0)
        (folder / "Q4_0").mkdir()
        made.write_split(folder / "Q4_0" / "tiny-Q4_0", Kind.Q4_0)
    shutil.rmtree(folder / "hf")
    for name in OTHERS:
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture
def hub(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(shutil.copytree(files, tmp_path / "repository"))
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield served
    served.close()


SPLIT = ["Q4_0/tiny-Q4_0-00001-of-00002.gguf", "Q4_0/tiny-Q4_0-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("chosen", "fetched"),
    [
        ("q8_0", ["tiny-Q8_0.gguf"]),
        ("Q4_0", SPLIT),
        ("tiny-Q8_0.gguf", ["tiny-Q8_0.gguf"]),
        (SPLIT[0], SPLIT),
    ],
)
def test_only_the_files_of_a_quantisation_are_fetched(
    chosen: str, fetched: list[str], hub: Hub, tmp_path: Path
) -> None:
    name = f"{REPOSITORY}:{chosen}"
    checkpoint = open_checkpoint(name)
    assert sorted(hub.fetched) == fetched
    assert checkpoint.name == name
    assert [file.relative_to(tmp_path / "cache").parts[2] for file in checkpoint.files] == [COMMIT] * len(fetched)
    assert identity(checkpoint).startswith("org-model-")
    hub.fetched.clear()
    assert open_checkpoint(name).files == checkpoint.files
    assert open_checkpoint(name, offline=True).files == checkpoint.files
    hub.close()
    assert open_checkpoint(name).files == checkpoint.files, "the cache does without a connection"
    assert hub.fetched == []


def test_an_interrupted_download_goes_on(hub: Hub) -> None:
    checkpoint = open_checkpoint(f"{REPOSITORY}:Q4_0")
    checkpoint.files[1].resolve().unlink()
    checkpoint.files[1].unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 parts"):
        open_checkpoint(f"{REPOSITORY}:Q4_0", offline=True)
    hub.fetched.clear()
    open_checkpoint(f"{REPOSITORY}:Q4_0")
    assert hub.fetched == [SPLIT[1]]


@pytest.mark.parametrize("chosen", ["", ":Q6_K", ":0", ":none.gguf"])
def test_several_quantisations_are_named(chosen: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(f"{REPOSITORY}{chosen}")
    assert str(caught.value) == "org/model has Q4_0, Q8_0: give one of them, such as org/model:Q4_0, as model="
    assert hub.fetched == []


def test_the_only_quantisation_needs_no_name(hub: Hub) -> None:
    """A `config.json` and other small files say nothing of it, and are not fetched."""
    shutil.rmtree(hub.folder / "Q4_0")
    assert open_checkpoint(REPOSITORY).name == REPOSITORY
    assert hub.fetched == ["tiny-Q8_0.gguf"]
    assert open_checkpoint(REPOSITORY, offline=True).gguf is not None


def test_offline_the_cache_says_what_it_has(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="not in the local Hugging Face cache: run once without offline="):
        open_checkpoint(f"{REPOSITORY}:Q8_0", offline=True)
    open_checkpoint(f"{REPOSITORY}:Q8_0")
    with pytest.raises(CheckpointError, match="has Q8_0 in the local Hugging Face cache: give org/model:Q8_0 as model"):
        open_checkpoint(f"{REPOSITORY}:Q4_0", offline=True)


def test_a_newer_commit_does_not_hide_what_was_fetched_before(hub: Hub, tmp_path: Path) -> None:
    first = open_checkpoint(f"{REPOSITORY}:Q8_0")
    cache = tmp_path / "cache" / "models--org--model"
    newer = cache / "snapshots" / COMMIT[::-1]
    newer.mkdir()
    (cache / "refs" / "main").write_text(newer.name)
    assert open_checkpoint(f"{REPOSITORY}:Q8_0", offline=True).files == first.files


def test_a_repository_that_is_not_given_says_what_to_do(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(CheckpointError, match=r"accept them at http.*/org/model, and log in with 'hf auth login'"):
        open_checkpoint(f"{REPOSITORY}:Q8_0")
    for name in ("org/none", "org/none:Q8_0"):
        with pytest.raises(CheckpointError, match=r"^org/none is not on the hub, .*: check the id given as model="):
            open_checkpoint(name)
    hub.close()
    for name in ("org/none", "org/none:Q8_0"):
        with pytest.raises(CheckpointError, match="not in the local Hugging Face cache: check the connection"):
            open_checkpoint(name)


def test_a_repository_without_gguf_files_says_so(hub: Hub) -> None:
    for file in hub.folder.rglob("*.gguf"):
        file.unlink()
    with pytest.raises(CheckpointError, match="org/model has no GGUF file of a model: check the name"):
        open_checkpoint(f"{REPOSITORY}:Q8_0")


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_of_gguf_files(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(files)
    assert str(caught.value) == f"{files} has Q4_0, Q8_0: give one of them, such as {files}:Q4_0, as model="
    found = open_checkpoint(f"{files}:q8_0")
    assert found.files == (files / "tiny-Q8_0.gguf",)
    assert found.name == f"{files}:q8_0"
    monkeypatch.chdir(files.parent)
    assert identity(open_checkpoint(f"{files.name}:q8_0")) == identity(found), "by any path"
    assert len(open_checkpoint(f"{files}:{SPLIT[0]}").files) == 2
    assert len(open_checkpoint(files / "Q4_0").files) == 2, "one model needs no name"


def test_a_checkpoint_of_transformers_comes_before_gguf_files_in_its_folder(files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(files, tmp_path / "both")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(CheckpointError, match="lacks 1 of 1 shards"):
        open_checkpoint(folder)
    assert open_checkpoint(f"{folder}:Q8_0").files == (folder / "tiny-Q8_0.gguf",)


@pytest.mark.parametrize("name", ["C:\\models\\tiny", "C:/models/tiny", "/no/where:Q8_0", "a:b:c", "./none:Q8_0", ":"])
def test_other_colons_are_part_of_a_path(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist: give a checkpoint's folder or a Hugging Face id"):
        open_checkpoint(name)


def test_a_folder_may_have_a_colon_in_its_name(files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(files, tmp_path / "a:Q8_0")
    assert open_checkpoint(f"{folder}:Q8_0").files == (folder / "tiny-Q8_0.gguf",)
    assert len(open_checkpoint(folder / "Q4_0").files) == 2


def test_a_dense_gguf_file_is_told(files: Path, tmp_path: Path) -> None:
    data = (files / "tiny-Q8_0.gguf").read_bytes().replace(b"qwen3moe.expert_count", b"qwen3moe.expert_xxxxx")
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not a Mixture-of-Experts model \(qwen3moe without experts\)"):
        open_checkpoint(tmp_path / "a.gguf")
