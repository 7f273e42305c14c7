"""`edgemoe pack`: a checkpoint with quantised weights, written once, so that no run has to quantise."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from edgemoe.cli.exits import Exit, FileTrouble, UsageError, why
from edgemoe.cli.output import put, say
from edgemoe.cli.progress_bar import progress_bar
from edgemoe.cli.surface import EngineFactory
from edgemoe.results import Progress
from edgemoe.sizes import format_bytes


def pack(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Write the checkpoint, or go on with it, and check it where asked to. No engine is loaded.

    Raises UsageError without a format, FileTrouble where the folder cannot be written, and CheckpointError and
    PlanError as packing does.
    """
    from edgemoe.checkpoint.blueprint import open_blueprint
    from edgemoe.checkpoint.packed import packing

    experts, dense = arguments.experts or "native", arguments.dense or "native"
    if experts == dense == "native":
        raise UsageError("nothing to pack to: give --experts int8, nf4, fp4 or int4, or --dense int8 or nf4")
    out = Path(arguments.out)
    blueprint = open_blueprint(arguments.model, offline=bool(arguments.offline), experts=experts, dense=dense)
    say("the result is lossy: 'edgemoe eval -m OUT --against MODEL' measures what it costs")
    with _files(out):
        with _progress("packed") as on_progress:
            made = packing.pack(blueprint, out, on_progress)
        if arguments.verify:
            with _progress("checked") as on_progress:
                wrong = packing.verify(out, on_progress)
            if wrong:
                raise FileTrouble(f"{out} is damaged ({wrong[0]}): remove it and pack again")
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    before = blueprint.checkpoint.nbytes
    what = "packed" if made else "was packed already"
    checked = ", checksums are right" if arguments.verify else ""
    put(f"{out}: {what}, {format_bytes(size)}, {size / before:.0%} of {format_bytes(before)}{checked}\n")
    return Exit.OK


@contextlib.contextmanager
def _files(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileTrouble(f"cannot write {out}: {why(error)}; the same command goes on with what is there") from error


@contextlib.contextmanager
def _progress(stage: str) -> Iterator[Callable[[int, int], None]]:
    """How far it is, on standard error within the block."""
    with progress_bar() as show:
        yield lambda done, total: show(Progress(stage, done, total))
