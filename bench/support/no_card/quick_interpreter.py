"""Triton's interpreter without what it does again and again."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Lets Triton's interpreter prepare its language once a module, not for each function that a kernel calls."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    prepared: set[int] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        # What was prepared for a function that a kernel calls stays so: the interpreter restores the kernel's own only.
        module = id(function.fn.__globals__)
        if module not in prepared:
            prepared.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    with mock.patch.object(interpreter.InterpretedFunction, "__call__", call):
        yield
