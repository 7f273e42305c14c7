"""Triton, for the modules that define kernels: importing this needs it.

Triton reads the annotations of a kernel as part of it, and knows of none but `constexpr`: kernels have no others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

if TYPE_CHECKING:
    constexpr: TypeAlias = Any
else:
    constexpr = tl.constexpr
