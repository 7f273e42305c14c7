"""Makes edgemoe importable from a checkout in which nothing was installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""


def lay_out() -> bool:
    """Lets `import edgemoe.cache` find the folder `cache/` of the checkout; returns whether there was a need.

    An installed edgemoe has its sub-packages; the checkout's folder `edgemoe/` lacks those that setup.cfg maps to
    the top level. To be called before anything imports a module of edgemoe.
    """
    if importlib.util.find_spec("edgemoe.cache") is not None:
        return False
    import edgemoe

    edgemoe.__path__.append(str(ROOT))
    return True
