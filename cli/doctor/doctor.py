"""`edgemoe doctor`: what this machine and its installation are fit for, and what to do about what is wrong or slow."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from edgemoe.cli.doctor.check import NOTE, OK, PROBLEM, Check
from edgemoe.cli.doctor.folders import folders
from edgemoe.cli.doctor.installation import installation
from edgemoe.cli.doctor.model import demo_model, named_model
from edgemoe.cli.exits import Exit
from edgemoe.cli.output import put
from edgemoe.cli.render import columns
from edgemoe.cli.surface import EngineFactory


def doctor(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Print every check on standard output; the exit code is 1 when one is a problem."""
    checks = list(_checks(arguments.model, engine))
    if arguments.json:
        put(json.dumps({"checks": [asdict(check) for check in checks]}, indent=2) + "\n")
    elif sys.stdout.isatty():
        _print_table(checks)
    else:
        put(columns([(check.status, check.name, check.told) for check in checks]) + "\n")
    return Exit.FAILED if any(check.status == PROBLEM for check in checks) else Exit.OK


def _checks(model: str | None, engine: EngineFactory | None) -> Iterator[Check]:
    yield from installation()
    try:
        # What these look at imports PyTorch.
        from edgemoe.cli.doctor.card import cards
        from edgemoe.cli.doctor.memory import memory
        from edgemoe.cli.doctor.processor import processor
    except (ImportError, OSError, RuntimeError) as error:
        yield Check("torch import", PROBLEM, f"failed: {error}", "install torch again for this machine")
    else:
        yield from processor()
        yield from memory()
        yield from cards()
    yield from folders()
    yield demo_model(engine)
    if model is not None:
        yield from named_model(model, engine)


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {OK: None, NOTE: "yellow", PROBLEM: "bold red"}
    table = Table("", "what", "found")
    for check in checks:
        table.add_row(check.status, check.name, check.told, style=colours[check.status])
    Console(markup=False).print(table)
