"""Whether Triton's kernels can be used, and if not, why."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from typing import Any


def missing() -> str:
    """Why Triton's kernels cannot be used here, in one sentence; empty where they can.

    Triton comes with PyTorch's builds for Linux; on Windows it is a package of its own. It compiles a launcher for each
    kernel with a C compiler.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton), so experts are computed one after the other"
    knobs: Any = importlib.import_module("triton.knobs")
    compiler = knobs.build.cc or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None and not knobs.runtime.interpret:
        return "Triton finds no C compiler (install gcc or set CC), so experts are computed one after the other"
    return ""
