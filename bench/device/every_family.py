"""`exact` on a card: every family of the zoo against transformers on the same card, in several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.device.layout import ROOT
from bench.device.section import Found, Target
from bench.support.zoo import TESTED

PROGRAM = """
import json, sys, tempfile
from pathlib import Path
from bench.device.layout import lay_out
lay_out()
import torch
from bench.exactness.exact import compare
from bench.support.zoo import config
from edgemoe import CheckpointError
torch.set_num_threads(1)
device, tokens, families = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
with tempfile.TemporaryDirectory() as folder:
    for family in families:
        try:
            config(family)
        except Exception:
            print(json.dumps({"family": family, "unknown": True}), flush=True)
            continue
        try:
            found = compare(family, Path(folder) / family, tokens, device)
        except CheckpointError:
            found = {"refused": True}
        except Exception as error:
            found = {"error": repr(error)[:200]}
        print(json.dumps({"family": family, **found}), flush=True)
"""
TOKENS, SMALL_TOKENS = 64, 8
LOGITS = 1e-4
"""Largest difference of a logit."""
PROCESSES = 6
TIMEOUT = 120.0


def measure(target: Target) -> Found:
    """How many families are exact, and what is wrong with the others."""
    families = ("mixtral",) if target.small else TESTED
    count = min(PROCESSES, len(families))
    seconds = min(TIMEOUT, max(1.0, target.seconds_left()))
    with ThreadPoolExecutor(count) as threads:
        parts = threads.map(lambda first: _compared(target, families[first::count], seconds), range(count))
    found = {each["family"]: each for part in parts for each in part}
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


def _compared(target: Target, families: tuple[str, ...], seconds: float) -> list[dict[str, Any]]:
    tokens = SMALL_TOKENS if target.small else TOKENS
    command = [sys.executable, "-c", PROGRAM, target.device, str(tokens), *families]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds).stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
    return [json.loads(line) for line in said.splitlines() if line.startswith('{"family"') and line.endswith("}")]
