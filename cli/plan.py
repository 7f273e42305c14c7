"""`edgemoe plan`: where everything would go, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from edgemoe.cli.arguments import model_settings
from edgemoe.cli.exits import Exit
from edgemoe.cli.loading import factory, say_simulation, say_which_model
from edgemoe.cli.output import put
from edgemoe.cli.render import columns
from edgemoe.cli.surface import EngineFactory

if TYPE_CHECKING:
    from edgemoe.plan.plan import Plan

_HEADINGS = ("what", "how much", "where and why")


def plan(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Print the plan on standard output. Raises PlanError when nothing fits."""
    say_which_model(arguments)
    made = factory(engine).plan_for(**model_settings(arguments))
    say_simulation(made)
    if arguments.json:
        put(json.dumps(made.to_dict(), indent=2) + "\n")
    elif sys.stdout.isatty():
        _print_table(made)
    else:
        put(columns([_HEADINGS, *made.lines()]) + "\n")
    return Exit.OK


def _print_table(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEADINGS)
    table.columns[1].justify = "right"
    for row in made.lines():
        table.add_row(*row)
    Console(markup=False).print(table)
