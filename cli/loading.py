"""From the command line to a loaded engine, with what a person should see while waiting."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from edgemoe.cli.arguments import model_settings
from edgemoe.cli.render import columns, harmless_line
from edgemoe.cli.surface import BatchEngineView, EngineFactory, EngineView
from edgemoe.cli.wording import in_options

if TYPE_CHECKING:
    from edgemoe.plan.plan import Plan
    from edgemoe.results import Progress

Loaded = TypeVar("Loaded", bound=BatchEngineView)


def say(sentence: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"edgemoe: {harmless_line(sentence)}\n")
    sys.stderr.flush()


def factory(engine: EngineFactory | None) -> EngineFactory:
    """The given source of engines, else the library's own, which is imported only here."""
    if engine is None:
        from edgemoe import Engine

        return Engine
    return engine


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
    return _open(arguments, lambda: factory(engine).load)


def open_ray_engines(arguments: argparse.Namespace) -> BatchEngineView:
    """The same on the Ray cluster that the command line names. Raises what `RayEngines.load` raises."""

    def load() -> Callable[..., BatchEngineView]:
        from edgemoe.cluster.engines import RayEngines

        return partial(RayEngines.load, arguments.ray)

    return _open(arguments, load)


def _open(arguments: argparse.Namespace, loader: Callable[[], Callable[..., Loaded]]) -> Loaded:
    say_which_model(arguments)
    with progress_bar() as on_progress:
        loaded = loader()(**model_settings(arguments), on_progress=on_progress)
    say_simulation(loaded.plan)
    say_not_served(loaded.plan)
    if arguments.verbose:
        sys.stderr.write(columns(loaded.plan.lines()) + "\n")
    return loaded


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None] | None]:
    """A bar on standard error within the block, when that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as ProgressBar

    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with ProgressBar(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def show(progress: Progress) -> None:
            bar.update(task, description=progress.stage, completed=progress.done, total=progress.total or None)

        yield show
