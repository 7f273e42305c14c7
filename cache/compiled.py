"""Functions that numba compiles, kept on disk where a folder for that can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function as machine code, with numba's `options`.

    Where nothing can be kept, as in a read-only installation of a user without a home, every process compiles anew.
    """

    def compile_it(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            # numba found no folder.
            return njit(**options)(function)

    return compile_it


def is_kept() -> bool:
    """Whether numba finds a folder that it can keep compiled code in."""
    try:
        njit(cache=True)(is_kept)
    except RuntimeError:
        return False
    return True
