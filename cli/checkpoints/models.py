"""`edgemoe models`: the checkpoints that are on this machine, and whether each would run here."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.cli.exits import Exit
from edgemoe.cli.loading import say
from edgemoe.cli.output import put
from edgemoe.cli.render import columns, print_table
from edgemoe.cli.surface import EngineFactory
from edgemoe.cli.wording import in_options
from edgemoe.errors import EdgeMoEError
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from edgemoe.checkpoint.catalog import CatalogEntry

_HEADINGS = ("model", "family", "experts", "size", "runs here")


@dataclass(frozen=True)
class Row:
    """A checkpoint, and what the plan for it says."""

    entry: CatalogEntry
    resident: float | None
    """The share of its experts that have slots; None where it would not run."""
    reason: str
    """Why it would not."""

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        entry = self.entry
        formats = ", ".join(entry.formats) or "-"
        return entry.model, entry.family or "-", formats, format_bytes(entry.nbytes), self._told()

    def to_dict(self) -> dict[str, Any]:
        """The object in JSON."""
        entry = self.entry
        return {
            "model": entry.model,
            "family": entry.family,
            "formats": list(entry.formats),
            "nbytes": entry.nbytes,
            "runs": self.resident is not None,
            "resident": self.resident,
            "reason": self.reason,
        }

    def _told(self) -> str:
        if self.resident is None:
            return f"no: {self.reason}"
        if self.resident == 1:
            return "yes"
        return f"yes, {max(1, int(100 * self.resident))} % of the experts in memory"


def models(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Print a row for each checkpoint in the hub's cache and in the folders given."""
    from edgemoe.checkpoint import catalog

    # One after the other: what is known of a large checkpoint takes memory.
    rows = [_row(entry) for entry in catalog.find(arguments.folders)]
    if not rows:
        say("no checkpoints in the Hugging Face cache, nor in the folders given")
    if arguments.json:
        put(json.dumps({"models": [row.to_dict() for row in rows]}, indent=2) + "\n")
    elif rows and sys.stdout.isatty():
        print_table(_HEADINGS, [row.cells() for row in rows], right=3)
    elif rows:
        put(columns([_HEADINGS, *(row.cells() for row in rows)]) + "\n")
    return Exit.OK


def _row(entry: CatalogEntry) -> Row:
    from edgemoe.config import EngineConfig
    from edgemoe.errors import PlanError, told_as
    from edgemoe.planner import make_plan

    if entry.blueprint is None:
        return Row(entry, None, in_options(entry.problem))
    try:
        with told_as(lambda why: PlanError(f"it cannot be planned ({why})"), of_files=True):
            plan = make_plan(entry.blueprint, EngineConfig())
    except EdgeMoEError as error:
        return Row(entry, None, in_options(str(error).removeprefix(f"{entry.model} ")))
    return Row(entry, plan.slots / plan.experts, "")
