"""`exact` on a card: every family of the zoo against transformers on the same card, in several processes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench.device.processes import in_processes
from bench.device.section import Found, Target
from bench.support.zoo import TESTED

TOKENS, SMALL_TOKENS = 64, 8
LOGITS = 1e-4
"""Largest difference of a logit."""
PROCESSES = 12
TIMEOUT = 120.0


def measure(target: Target) -> Found:
    """How many families are exact, and what is wrong with the others."""
    families = ("mixtral",) if target.small else TESTED
    found = in_processes(__name__, target, families, PROCESSES, TIMEOUT)
    # With an older transformers, which has not all of the families, or has one in another form.
    unknown = [family for family, each in found.items() if "unknown" in each]
    refused = [family for family, each in found.items() if "refused" in each]
    compared = {family: each for family, each in found.items() if family not in unknown + refused}
    exact = [family for family, each in compared.items() if each.get("same") and each["logits"] <= LOGITS]
    figures = {
        "families": len(compared),
        "exact": len(exact),
        "largest_logit_difference": max([each.get("logits", 0.0) for each in compared.values()], default=0.0),
        "unknown_to_this_transformers": unknown,
        "refused_with_this_transformers": refused,
    }
    faults = [f"{family}: {each}" for family, each in compared.items() if family not in exact]
    return Found(figures, faults + [f"{family} was not reached" for family in families if family not in found])


def found(family: str, device: str, small: bool) -> dict[str, Any]:
    """What `exact.compare` says of one family on `device`, or why it is not compared."""
    from bench.exactness.exact import compare
    from bench.support.zoo import config
    from edgemoe import CheckpointError

    try:
        config(family)
    except Exception:
        return {"unknown": True}
    with tempfile.TemporaryDirectory(prefix="edgemoe-family-") as folder:
        try:
            return compare(family, Path(folder) / family, SMALL_TOKENS if small else TOKENS, device)
        except CheckpointError:
            return {"refused": True}
