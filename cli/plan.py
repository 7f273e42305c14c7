"""`edgemoe plan`: where everything would go, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import sys

from edgemoe.cli.arguments import model_settings
from edgemoe.cli.exits import Exit
from edgemoe.cli.loading import check_model_path, factory, say_simulation, say_which_model
from edgemoe.cli.output import put
from edgemoe.cli.render import columns, print_table
from edgemoe.cli.surface import EngineFactory

_HEADINGS = ("what", "how much", "where and why")


def plan(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Print the plan on standard output. Raises PlanError when nothing fits."""
    if engine is None:
        check_model_path(arguments.model)
    say_which_model(arguments)
    made = factory(engine).plan_for(**model_settings(arguments))
    say_simulation(made)
    if arguments.json:
        put(json.dumps(made.to_dict(), indent=2) + "\n")
    elif sys.stdout.isatty():
        print_table(_HEADINGS, made.lines(), right=1)
    else:
        put(columns([_HEADINGS, *made.lines()]) + "\n")
    return Exit.OK
