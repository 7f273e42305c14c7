"""A checkpoint that is written to under a loaded engine gives an error, and never a wrong token."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.field.case import tiny
from edgemoe import CheckpointError, Engine, Sampling
from edgemoe.cache.file_reader import FileChanged, FileIdentity, open_file
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.runtime import Runtime

PROMPTS = [[5, 60, 70, 80], [9, 8, 7], [100, 120, 140, 160], [33, 44, 55]]
GREEDY = Sampling(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("changed") / "model", num_experts=16)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def load(folder: Path) -> Engine:
    """An engine that must read experts for nearly every token."""
    return Engine.load(folder, state_folder="none", device="cpu", expert_cache="25%", prefetch="off")


def zeros_in_the_middle(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 3)
        stream.write(bytes(file.stat().st_size // 2))


def other_weights_over_it(file: Path) -> None:
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    content[length:] = content[length:][::-1]
    file.write_bytes(bytes(content))


def shorter(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


@pytest.mark.parametrize("change", [zeros_in_the_middle, other_weights_over_it, shorter])
def test_a_file_that_is_written_to_ends_requests_by_name(folder: Path, change: Callable[[Path], None]) -> None:
    file = folder / "model.safetensors"
    with load(folder) as engine:
        right = [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
        change(file)
        said = ""
        for prompt, tokens in zip(PROMPTS * 3, right * 3, strict=True):
            try:
                assert engine.generate(prompt, GREEDY).token_ids == tokens
            except CheckpointError as error:
                said = str(error)
        assert "model.safetensors" in said
        assert "changed since it was loaded" in said or "ends before byte" in said


def test_a_file_with_another_one_put_in_its_place_is_read_on(folder: Path) -> None:
    file = folder / "model.safetensors"
    with load(folder) as engine:
        right = [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
        other = folder / "other"
        shutil.copy(file, other)
        other_weights_over_it(other)
        os.replace(other, file)
        assert [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS] == right


def test_a_file_that_changes_while_it_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Runtime.__init__

    def changed_before(self: Runtime, *given: object, **more: object) -> None:
        os.utime(folder / "model.safetensors", ns=(1, 1))
        plain(self, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Runtime, "__init__", changed_before)
    with pytest.raises(CheckpointError, match=r"model.safetensors changed since it was loaded\): load it again"):
        load(folder)


@pytest.mark.parametrize("direct", [False, True])
def test_a_reader_knows_its_file(tmp_path: Path, direct: bool) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8192))
    reader = open_file(file, direct=direct)
    try:
        before = reader.identity
        assert before == FileIdentity.of(file)
        os.utime(file, ns=(5, 5))
        assert reader.identity != before
        assert reader.identity == FileIdentity.of(file)
    finally:
        reader.close()


def test_the_headers_are_read_after_the_identities_are_taken(folder: Path) -> None:
    checkpoint = open_blueprint(folder).checkpoint
    assert checkpoint.identities == (FileIdentity.of(folder / "model.safetensors"),)
    assert "load it again" in FileChanged.mend
