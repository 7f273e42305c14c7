from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgemoe.cli.chat.completion import completions


def last_word(line: str) -> str:
    return line.rpartition(" ")[2]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/sh", ["/show"]),
        ("/re", ["/regen", "/retry", "/read "]),
        ("/nothing", []),
        ("hello /sh", []),
        ("", []),
        ("/set m", ["min_p ", "max_tokens "]),
        ("/set top-", ["top_k ", "top_p "]),
        ("/set top_k 1", []),
        ("/clear ", []),
        ("/frob x", []),
    ],
)
def test_commands_and_settings(line: str, found: list[str]) -> None:
    assert completions(line, last_word(line)) == found


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("poem.txt", "poems two.txt", "prose", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "poetry").mkdir()
    monkeypatch.chdir(tmp_path)
    assert completions("/read poe", "poe") == ["poem.txt", "poems two.txt", "poetry/"]
    assert completions("/save ", "") == ["poem.txt", "poems two.txt", "poetry/", "prose"]
    assert completions("/load .h", ".h") == [".hidden"]
    # The word before the space stays; only what follows is replaced.
    assert completions("/read poems t", "t") == ["two.txt"]
    assert completions(f"/read {tmp_path}/pr", f"{tmp_path}/pr") == [f"{tmp_path}/prose"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completions("/read ~/pr", "~/pr") == ["~/prose"]
    assert completions("/read nosuch/", "nosuch/") == []
    assert completions("/read ~nosuchuser/x", "~nosuchuser/x") == []
    assert completions("/read a\0b/", "a\0b/") == []


def test_a_link_that_leads_nowhere_is_a_file(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    assert completions(f"/read {tmp_path}/l", f"{tmp_path}/l") == [f"{tmp_path}/link"]
