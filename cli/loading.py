"""From the command line to a loaded engine, with what a person should see while waiting."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgemoe.cli.arguments import model_settings
from edgemoe.cli.exits import UsageError
from edgemoe.cli.interruption import leaving_at_once
from edgemoe.cli.options.parser import cut
from edgemoe.cli.output import say
from edgemoe.cli.progress_bar import progress_bar
from edgemoe.cli.render import columns
from edgemoe.cli.surface import BatchEngineView, EngineFactory, EngineView
from edgemoe.cli.wording import in_options
from edgemoe.errors import CheckpointError
from edgemoe.results import Progress

if TYPE_CHECKING:
    from edgemoe.plan.plan import Plan

Loaded = TypeVar("Loaded", bound=BatchEngineView)


def factory(engine: EngineFactory | None) -> EngineFactory:
    """The given source of engines, else the library's own, which is imported only here."""
    if engine is None:
        with leaving_at_once():
            from edgemoe import Engine

        return Engine
    return engine


def check_model_path(model: str | None) -> None:
    """Raises CheckpointError for a path where nothing is: at once, and not after PyTorch is imported."""
    if model is None or (model.count("/") == 1 and model[0] not in "./~" and not model.endswith(".gguf")):
        return  # nothing, or the id of a repository
    if not model.strip():
        raise UsageError("argument -m/--model: the name is empty; give a checkpoint's folder or a Hugging Face id")
    # What follows a colon may be a quantisation.
    if not any(_exists(path) for path in (model, model.rpartition(":")[0]) if path):
        raise CheckpointError(
            f"{cut(model)} does not exist: give a checkpoint's folder or a Hugging Face id such as org/name with -m"
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def say_which_model(arguments: argparse.Namespace) -> None:
    """Say that the demo model is used, when no other is asked for."""
    if arguments.model is None:
        say("no model given, so the small demo model that ships with edgemoe is used (choose another with -m)")


def say_simulation(plan: Plan) -> None:
    """Say what is simulated, so that no number is taken for this machine's own."""
    if plan.simulation is not None:
        say(in_options(plan.simulation))


def say_not_served(plan: Plan) -> None:
    """Say what the checkpoint asks for and does not get."""
    if plan.not_served:
        say(f"not served, of the checkpoint's generation_config.json: {', '.join(plan.not_served)}")


def say_lossy(plan: Plan) -> None:
    """Say what makes replies differ from the model's own, and how to see how much."""
    if plan.lossy:
        say(f"lossy: {plan.lossy}; 'edgemoe eval' with the same options of the model measures what that costs")


def open_engine(arguments: argparse.Namespace, engine: EngineFactory | None) -> EngineView:
    """Load the model that the command line names. The caller closes it. Raises what `Engine.load` raises."""
    if engine is not None:
        return _open(arguments, lambda: engine.load)
    check_model_path(arguments.model)
    with leaving_at_once():
        return _open(arguments, lambda: factory(engine).load)


def open_ray_engines(arguments: argparse.Namespace) -> BatchEngineView:
    """The same on the Ray cluster that the command line names. Raises what `RayEngines.load` raises."""

    def load() -> Callable[..., BatchEngineView]:
        from edgemoe.cluster.engines import RayEngines

        return partial(RayEngines.load, arguments.ray)

    return _open(arguments, load)


def _open(arguments: argparse.Namespace, loader: Callable[[], Callable[..., Loaded]]) -> Loaded:
    say_which_model(arguments)
    with progress_bar("importing PyTorch") as on_progress:
        load = loader()
        on_progress(Progress("reading the checkpoint", 0, 0))
        loaded = load(**model_settings(arguments), on_progress=on_progress)
    say_simulation(loaded.plan)
    say_not_served(loaded.plan)
    if arguments.verbose:
        sys.stderr.write(columns(loaded.plan.lines()) + "\n")
    return loaded
