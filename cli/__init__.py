"""The terminal: arguments, rendering and files. It knows nothing of how a token is made."""

from __future__ import annotations

import edgemoe

if getattr(edgemoe, "__file__", None) is None:
    # A folder without modules goes before the checkout of an editable installation.
    raise ImportError(
        f"an earlier installation of edgemoe has left files behind: remove the folder {edgemoe.__path__[0]}"
    )
