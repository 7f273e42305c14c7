"""Compiled functions where nothing can be kept on disk."""

from __future__ import annotations

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
