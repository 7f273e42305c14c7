"""`edgemoe affinity`: finds out once which experts of a model resemble one another, and keeps it."""

from __future__ import annotations

import argparse

from edgemoe.checkpoint.state_folder import NONE, keeps_nothing
from edgemoe.cli.exits import Exit, FileTrouble, UsageError, why
from edgemoe.cli.loading import say_which_model
from edgemoe.cli.output import put
from edgemoe.cli.progress_bar import progress_bar
from edgemoe.cli.render import counted
from edgemoe.cli.surface import EngineFactory
from edgemoe.sizes import format_bytes


def affinity(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Compute and keep what is not kept yet, and say on standard output where it is. No engine is needed.

    Raises UsageError where nothing is to be kept, FileTrouble where nothing can be, and CheckpointError.
    """
    if keeps_nothing(arguments.state_folder):
        raise UsageError(f"argument --state-folder: {NONE} keeps nothing, and affinity is for keeping; give a folder")
    say_which_model(arguments)
    from edgemoe.checkpoint.blueprint import open_blueprint
    from edgemoe.draft.affinity_file import prepare

    blueprint = open_blueprint(arguments.model, offline=bool(arguments.offline))
    try:
        with progress_bar() as on_progress:
            made = prepare(blueprint, arguments.state_folder, on_progress)
    except OSError as error:
        folder = arguments.state_folder or "the user's cache folder"
        raise FileTrouble(f"cannot keep files in {folder}: {why(error)}; give another with --state-folder") from error
    assert made is not None, "nobody cancels it"
    layers, experts = counted(len(made.affinity.experts), "MoE layer"), counted(sum(made.affinity.experts), "expert")
    size, place = format_bytes(made.affinity.nbytes), f"{'kept already' if made.was_kept else 'kept'} in {made.path}"
    put(f"{blueprint.checkpoint.name}: affinity of {experts} in {layers}, {size}, {place}\n")
    return Exit.OK
