"""`edgemoe models`: the checkpoints that are on this machine, and whether each would run here."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from edgemoe.cli.exits import Exit
from edgemoe.cli.output import put, say
from edgemoe.cli.render import columns, print_table
from edgemoe.cli.surface import EngineFactory
from edgemoe.cli.wording import in_options
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from edgemoe import FoundModel

_HEADINGS = ("model", "family", "experts", "size", "runs here")


def models(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Print a row for each checkpoint in the hub's cache and in the folders given."""
    from edgemoe import find_models

    found = list(find_models(arguments.folders))
    if not found:
        say("no checkpoints in the Hugging Face cache, nor in the folders given")
    if arguments.json:
        put(json.dumps({"models": [_object(each) for each in found]}, indent=2) + "\n")
    elif found and sys.stdout.isatty():
        print_table(_HEADINGS, list(map(_cells, found)), right=3)
    elif found:
        put(columns([_HEADINGS, *map(_cells, found)]) + "\n")
    return Exit.OK


def _cells(found: FoundModel) -> tuple[str, ...]:
    formats = ", ".join(found.formats) or "-"
    return found.model, found.family or "-", formats, format_bytes(found.nbytes), _told(found)


def _told(found: FoundModel) -> str:
    if found.resident is None:
        return f"no: {in_options(found.problem)}"
    if found.resident == 1:
        return "yes"
    return f"yes, {max(1, int(100 * found.resident))} % of the experts in memory"


def _object(found: FoundModel) -> dict[str, Any]:
    return {
        "model": found.model,
        "family": found.family,
        "formats": list(found.formats),
        "nbytes": found.nbytes,
        "runs": found.runs,
        "resident": found.resident,
        "reason": in_options(found.problem),
    }
