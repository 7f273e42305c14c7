"""Machines on which the usual temporary folders cannot be written."""

from __future__ import annotations

import tempfile

import pytest

from edgemoe.cli import temporary
from edgemoe.cli.exits import UsageError
from edgemoe.cli.temporary import ensure_temporary_folder


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])


def test_a_folder_in_memory_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "IN_MEMORY", "/")
    ensure_temporary_folder()
    assert tempfile.gettempdir() == "/"


def test_without_any_a_sentence_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "IN_MEMORY", "/nonexistent")
    with pytest.raises(UsageError, match="name one in the variable TMPDIR"):
        ensure_temporary_folder()
