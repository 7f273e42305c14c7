"""The checkpoints that are found on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from bench.support.gguf_files import GgufMaker, Kind
from bench.support.zoo import make
from edgemoe.checkpoint import catalog
from edgemoe.checkpoint.catalog import CatalogEntry
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import edit


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sharded checkpoint of transformers, `mixtral`, and one with two GGUF files, `gguf`."""
    folder = tmp_path_factory.mktemp("models")
    with quiet_transformers():
        make("mixtral", folder / "mixtral", max_shard_size="300KB")
        maker = GgufMaker.of_zoo("qwen3_moe", folder / "gguf")
        maker.write(folder / "gguf" / "tiny-Q8_0.gguf", Kind.Q8_0)
        maker.write_split(folder / "gguf" / "tiny-Q4_0", Kind.Q4_0)
    shutil.rmtree(folder / "gguf" / "hf")
    (folder / "gguf" / "mmproj-F16.gguf").write_bytes(b"no model")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty at first; nothing may ask the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *given: pytest.fail("it used the network"))
    return tmp_path / "cache"


def in_cache(cache: Path, name: str, folder: Path) -> Path:
    """The snapshot of a repository in the cache with the files of `folder`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


def found(*folders: Path) -> dict[str, CatalogEntry]:
    return {entry.model: entry for entry in catalog.find(folders)}


def test_a_folder_of_models(made: Path) -> None:
    entries = found(made)
    first, second, third = sorted(entries)
    assert [first, second, third] == [
        f"{made}/gguf/tiny-Q4_0-00001-of-00002.gguf", f"{made}/gguf/tiny-Q8_0.gguf", f"{made}/mixtral",
    ]  # fmt: skip
    assert entries[second].formats == ("Q8_0",)
    assert entries[second].family == "qwen3_moe"
    assert entries[second].nbytes == Path(second).stat().st_size
    assert entries[third].formats == ("fp32",)
    assert entries[third].family == "mixtral"
    assert entries[third].nbytes == sum(file.stat().st_size for file in (made / "mixtral").iterdir())
    assert all(entry.blueprint is not None and not entry.problem for entry in entries.values())
    assert found(made / "mixtral").keys() == {third}
    assert found(Path(second)).keys() == {second}
    assert found(made.parent / "none") == {
        f"{made.parent}/none": CatalogEntry(f"{made.parent}/none", 0, None, problem="does not exist")
    }


def test_the_cache_of_the_hub(made: Path, cache: Path) -> None:
    in_cache(cache, "org/mixtral", made / "mixtral")
    in_cache(cache, "org/tiny-GGUF", made / "gguf")
    (cache / "datasets--org--texts" / "snapshots").mkdir(parents=True)
    (cache / "models--org--asked" / "refs").mkdir(parents=True)
    entries = found()
    assert list(entries) == ["org/mixtral", "org/tiny-GGUF:Q4_0", "org/tiny-GGUF:Q8_0"]
    assert all(entry.blueprint is not None for entry in entries.values())


def test_a_partial_download_says_so(made: Path, cache: Path) -> None:
    snapshot = in_cache(cache, "org/mixtral", made / "mixtral")
    next(snapshot.glob("model-*.safetensors")).unlink()
    assert "lacks 1 of" in found()["org/mixtral"].problem
    (cache / "models--org--mixtral" / "blobs" / "abc.incomplete").write_bytes(bytes(1000))
    entry = found()["org/mixtral"]
    assert entry.problem == "partly downloaded: give it as model= to fetch the rest"
    assert entry.family == "mixtral"
    edit(snapshot / "config.json", lambda config: config.update(model_type="llama"))
    assert found()["org/mixtral"].problem.startswith("not a Mixture-of-Experts model"), "its rest is of no use"


def test_a_partial_download_of_a_gguf_file_says_so(made: Path, cache: Path) -> None:
    snapshot = in_cache(cache, "org/tiny", made / "gguf")
    (snapshot / "tiny-Q8_0.gguf").unlink()
    (cache / "models--org--tiny" / "blobs" / "abc.incomplete").write_bytes(bytes(1000))
    entries = found()
    assert list(entries) == ["org/tiny:Q4_0", "org/tiny"]
    assert not entries["org/tiny:Q4_0"].problem
    assert entries["org/tiny"].problem.startswith("partly downloaded")
    assert entries["org/tiny"].nbytes == 1000
    (snapshot / "tiny-Q4_0-00002-of-00002.gguf").unlink()
    assert "lacks 1 of 2 parts" in found()["org/tiny:Q4_0"].problem


def test_what_cannot_be_run_is_an_entry_with_the_reason(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    changes = {"dense": {"model_type": "llama"}, "new": {"model_type": "nosuch"}, "bert": {"model_type": "bert"}}
    for name, change in changes.items():
        shutil.copytree(made / "mixtral", folder / name)
        edit(folder / name / "config.json", lambda config, change=change: config.update(change))  # type: ignore[misc]
    for name in ("damaged", "cut"):
        shutil.copytree(made / "mixtral", folder / name)
    (folder / "damaged" / "config.json").write_text("{")
    shard = next((folder / "cut").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / "a").mkdir()
    (folder / "a" / "dense-Q8_0.gguf").write_bytes(
        (made / "gguf" / "tiny-Q8_0.gguf").read_bytes().replace(b"qwen3moe.expert_count", b"qwen3moe.expert_xxxxx")
    )
    (folder / "a" / "damaged-Q8_0.gguf").write_bytes(b"GGUF")
    (folder / "empty" / "deeper" / "deepest").mkdir(parents=True)
    (folder / "loop").symlink_to(folder)
    said = {Path(model).name: entry.problem for model, entry in found(folder).items() if "loop" not in model}
    assert said.pop("damaged").startswith(f"{folder}/damaged/config.json cannot be read as JSON")
    assert "is truncated" in said.pop("cut")
    assert said.pop("dense") == "not a Mixture-of-Experts model (llama without experts): run it with transformers"
    assert said.pop("new").startswith("of the family nosuch, unknown to this transformers")
    assert said.pop("bert")
    assert said.pop("dense-Q8_0.gguf").startswith("not a Mixture-of-Experts model (qwen3moe without experts)")
    assert "damaged" in said.pop("damaged-Q8_0.gguf")
    assert said == {}


def test_a_folder_that_the_hub_has_not_filled_yet(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fetched"
    (folder / catalog.UNFINISHED).mkdir(parents=True)
    (folder / catalog.UNFINISHED / "abc.incomplete").write_bytes(bytes(10))
    assert found(folder)[str(folder)].problem == "partly downloaded: fetch the rest"


def test_missing_experts_are_seen(made: Path, tmp_path: Path) -> None:
    """The experts' shapes are left out of the check, their names are not."""
    folder = shutil.copytree(made / "mixtral", tmp_path / "mixtral")
    edit(folder / "config.json", lambda config: config.update(num_local_experts=9))
    assert "not one for each of 9 experts" in found(folder)[str(folder)].problem
    edit(folder / "config.json", lambda config: config.update(num_local_experts=8, num_hidden_layers=5))
    assert "lacks" in found(folder)[str(folder)].problem
