"""State folders: at the place of the platform's convention, one per checkpoint, with atomic writes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemoe import Engine, Sampling
from edgemoe.cache import ExpertId
from edgemoe.checkpoint.checkpoint import Checkpoint, open_checkpoint
from edgemoe.checkpoint.state_folder import StateFolder, identity, keeps_nothing, user_cache
from tests.support.checkpoints import Zoo

MOST = 1000


def a_checkpoint(folder: Path, name: str | None = None, content: bytes = b"weights") -> Checkpoint:
    """A checkpoint with a file but no tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    file.write_bytes(content)
    os.utime(file, ns=(10**18, 10**18))
    return Checkpoint(folder, name or str(folder), {}, (file,), {})


def place(checkpoint: Checkpoint, root: Path) -> Path:
    path = StateFolder.of(checkpoint, root).path
    assert path is not None
    return path


def leftovers(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


# --- where ---------------------------------------------------------------------------------------


def test_the_users_cache_folder_is_that_of_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = str(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for platform, expected in [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")]:
        monkeypatch.setattr(sys, "platform", platform)
        assert user_cache() == tmp_path / expected
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert user_cache() == tmp_path / "local"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert user_cache() == tmp_path / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg"
    path = StateFolder.of(a_checkpoint(tmp_path / "model"), None).path
    assert path is not None
    assert path.parent == tmp_path / "xdg" / "edgemoe"


def test_a_folder_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "model")
    assert place(checkpoint, tmp_path / "mine").parent == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert place(checkpoint, Path("~/mine")).parent == tmp_path / "mine"
    assert not (tmp_path / "mine").exists(), "asking where creates nothing"
    monkeypatch.chdir(tmp_path)
    state = StateFolder.of(checkpoint, "here")
    monkeypatch.chdir("/")
    assert state.path is not None
    assert state.path.parent == tmp_path / "here"


@pytest.mark.parametrize("folder", ["none", "None", ""])
def test_nothing_is_kept_where_that_is_asked_for(folder: str, tmp_path: Path) -> None:
    state = StateFolder.of(a_checkpoint(tmp_path), folder)
    assert keeps_nothing(folder)
    assert state.path is None
    assert state.read("a", MOST) is None
    acts: list[Callable[[], None]] = [lambda: state.write("a", b""), state.probe]
    for act in acts:
        with pytest.raises(OSError, match="no folder"):
            act()
    assert leftovers(tmp_path) == ["model.safetensors"]


def test_what_only_looks_like_none_is_a_folder() -> None:
    assert not any(keeps_nothing(folder) for folder in (None, "./none", Path("none/x"), "nonesuch"))


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", homeless)
    assert StateFolder.of(a_checkpoint(tmp_path), None).path is None


def test_a_checkpoint_that_has_gone_is_not_remembered(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "model")
    checkpoint.files[0].unlink()
    assert StateFolder.of(checkpoint, tmp_path).path is None


# --- which checkpoint ----------------------------------------------------------------------------


def test_an_identity_stays_and_is_the_same_by_any_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "My model (v2)"
    whole = identity(a_checkpoint(folder))
    assert whole == identity(a_checkpoint(folder))
    assert whole.startswith("My-model-v2-")
    monkeypatch.chdir(folder)
    assert identity(a_checkpoint(folder, ".")) == identity(a_checkpoint(folder, "../My model (v2)")) == whole


def test_checkpoints_of_one_name_are_told_apart_by_their_files(tmp_path: Path) -> None:
    first = a_checkpoint(tmp_path / "a" / "model")
    assert identity(first) == identity(a_checkpoint(tmp_path / "copy" / "model")), "a faithful copy is the same"
    larger = a_checkpoint(tmp_path / "b" / "model", content=b"other weights")
    later = a_checkpoint(tmp_path / "c" / "model")
    os.utime(later.files[0], ns=(10**18, 10**18 + 1))
    renamed = a_checkpoint(tmp_path / "d" / "model")
    renamed = Checkpoint(
        renamed.folder, renamed.name, {}, (renamed.files[0].rename(renamed.folder / "m.safetensors"),), {}
    )
    kinds = [first, larger, later, renamed, a_checkpoint(tmp_path / "e" / "model", "other/model")]
    assert len({identity(each) for each in kinds}) == len(kinds)
    states = [StateFolder.of(each, tmp_path / "state") for each in kinds]
    for number, state in enumerate(states):
        state.write("a", bytes([number]))
    assert [state.read("a", MOST) for state in states] == [bytes([number]) for number in range(len(states))]


@pytest.mark.parametrize(
    "name", ["org/model", "..", "...", "a/../../b", "CON", "x" * 500, "模型", "-rf", "a\nb", "\udcff"]
)
def test_any_name_makes_a_folder_within_the_root(name: str, tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "model", name)
    state = StateFolder.of(checkpoint, tmp_path / "state")
    assert state.path is not None
    assert state.path.parent == tmp_path / "state"
    assert len(state.path.name) < 80
    assert state.path.name.isascii()
    assert not state.path.name.startswith((".", "-"))
    state.write("a", b"1")
    assert state.read("a", MOST) == b"1"


# --- reading and writing -------------------------------------------------------------------------


def test_what_was_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "deep" / "er")
    assert state.read("a", MOST) is None
    state.probe()
    assert leftovers(tmp_path / "deep" / "er") == []
    for data in (b"one", b"", bytes(MOST)):
        state.write("a", data)
        assert state.read("a", MOST) == data
    state.write("b", b"two")
    assert leftovers(tmp_path / "deep" / "er") == ["a", "b"]


def test_what_is_too_large_or_no_file_is_not_read(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    (tmp_path / "large").write_bytes(bytes(MOST + 1))
    (tmp_path / "folder").mkdir()
    assert state.read("large", MOST) is None
    assert state.read("folder", MOST) is None
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert state.read("pipe", MOST) is None


def test_a_folder_that_cannot_be_made_is_an_error_of_writing_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    state = StateFolder(tmp_path / "file" / "state")
    assert state.read("a", MOST) is None
    acts: list[Callable[[], None]] = [lambda: state.write("a", b"1"), state.probe]
    for act in acts:
        with pytest.raises(OSError, match=r"file"):
            act()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFolder(tmp_path)
    state.write("a", b"old")

    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        state.write("a", b"new")
    assert state.read("a", MOST) == b"old"
    assert leftovers(tmp_path) == ["a"]


def test_writers_and_readers_at_once_see_whole_files(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    kinds = [bytes([number]) * 100_000 for number in range(4)]
    state.write("a", kinds[0])
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(60):
                if number < 4:
                    state.write("a", kinds[number])
                elif state.read("a", 1 << 20) not in kinds:
                    wrong.append("torn")
        except OSError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert leftovers(tmp_path) == ["a"]


def test_writers_in_several_processes_do_not_meet(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from edgemoe.checkpoint.state_folder import StateFolder\n"
        "for _ in range(50): StateFolder(Path(sys.argv[1])).write('a', sys.argv[2].encode() * 50000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), letter]) for letter in "xy"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert StateFolder(tmp_path).read("a", 1 << 20) in (b"x" * 50000, b"y" * 50000)
    assert leftovers(tmp_path) == ["a"]


# --- the engine is a good guest ------------------------------------------------------------------


@pytest.mark.parametrize("where", ["none", "file/state"])
def test_an_engine_runs_where_nothing_can_be_kept(where: str, zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = where if where == "none" else str(tmp_path / where)
    with Engine.load(zoo("mixtral"), expert_cache=4, threads=1, state_folder=folder) as engine:
        # There is something to write, whatever the policy's own heat is.
        engine._loaded().cache._policy.heat = lambda: {ExpertId(0, 0): 1.0}  # type: ignore[method-assign]
        assert engine.generate([5, 6, 7], Sampling(max_tokens=2)).text == ""
    assert leftovers(tmp_path) == ["file"]


def test_the_checkpoints_own_folder_is_left_alone(zoo: Zoo, tmp_path: Path) -> None:
    folder = zoo("mixtral")
    before = leftovers(folder)
    with Engine.load(folder, expert_cache=4, threads=1, state_folder=tmp_path) as engine:
        engine._loaded().cache._policy.heat = lambda: {ExpertId(0, 0): 1.0}  # type: ignore[method-assign]
    assert leftovers(folder) == before
    assert leftovers(tmp_path) == [identity(open_checkpoint(folder))]
