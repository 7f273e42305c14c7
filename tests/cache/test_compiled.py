"""Compiled functions, kept on disk or not."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from edgemoe.cache import compiled as module
from edgemoe.cache.compiled import compiled


def test_functions_compile_where_nothing_can_be_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """LMCache/LMCache#4597: numba finds no folder in a read-only installation of a user without a home."""
    asked: list[tuple[bool, bool]] = []

    def njit(*, cache: bool = False, nogil: bool) -> Any:
        asked.append((cache, nogil))
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available for file")
        return lambda function: function

    monkeypatch.setattr(module, "njit", njit)
    assert compiled(nogil=True)(print) is print
    assert asked == [(True, True), (False, True)]


def test_code_of_another_version_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """numba looks at a function's own module alone: what writes its code may have changed below it."""
    source = tmp_path / "kernel.py"
    source.write_text("def add(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    add = importlib.import_module("kernel").add

    def found_on_disk(digest: str) -> bool:
        monkeypatch.setattr(module, "generators_digest", lambda: digest)
        again = compiled(nogil=True)(add)
        assert again(1) == 2
        return bool(again.stats.cache_hits)

    assert [found_on_disk(digest) for digest in ("one", "one", "two", "two")] == [False, True, False, True]


def test_the_digest_is_of_all_that_writes_code() -> None:
    assert len(module.generators_digest()) == 64
    assert all(importlib.import_module(name).__path__ for name in module.GENERATORS)


@pytest.mark.parametrize("installed", [True, False])
def test_code_of_an_installed_module_is_kept_away_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool
) -> None:
    """pip leaves a folder with other files behind, which hides a checkout that is installed later."""
    folder = tmp_path / ("site-packages" if installed else "checkout")
    folder.mkdir()
    (folder / f"kernel_{installed}.py").write_text("def add(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(folder)
    assert compiled(nogil=True)(importlib.import_module(f"kernel_{installed}").add)(1) == 2
    kept = {file.suffix for file in folder.rglob("*")}
    assert (".nbi" in kept) != installed
    in_cache = [*Path(os.environ["XDG_CACHE_HOME"]).rglob("*.nbi")]
    assert bool(in_cache) == installed
