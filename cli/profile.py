"""`edgemoe profile`: measures a model on this machine and keeps what says when speculation pays."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.arguments import model_settings
from edgemoe.cli.exits import Exit, FileTrouble, UsageError, why
from edgemoe.cli.loading import progress_bar, say, say_which_model
from edgemoe.cli.output import put
from edgemoe.cli.render import columns
from edgemoe.cli.surface import EngineFactory
from edgemoe.state_folder import NONE, keeps_nothing

if TYPE_CHECKING:
    from edgemoe.profile_file import Profile

_PICTURES = (".png", ".svg")
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_POINTS = ("batch", "tokens each", "slots", "measured", "predicted", "experts a layer", "misses")
_WORTH = (
    "batch",
    "tokens/s",
    "experts a layer",
    "efficiency at 3",
    "speed-up at 3",
    "efficiency at 8",
    "speed-up at 8",
)


def profile(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Measure, fit, keep, and print on standard output. No engine is needed.

    Raises UsageError for a picture that cannot be made, FileTrouble where the profile or the picture cannot be
    kept, and CheckpointError and PlanError as loading does.
    """
    picture = None if arguments.plot is None else _checked(Path(arguments.plot))
    say_which_model(arguments)
    from edgemoe import profile_file
    from edgemoe.blueprint import open_blueprint
    from edgemoe.config import EngineConfig
    from edgemoe.profiler import take_profile
    from edgemoe.state_folder import StateFolder

    settings = model_settings(arguments)
    blueprint = open_blueprint(
        settings.pop("model", None), settings.get("dtype", "auto"), offline=bool(arguments.offline)
    )
    state = StateFolder.of(blueprint.checkpoint, arguments.state_folder)
    keeps = not keeps_nothing(arguments.state_folder)
    if keeps:
        with _told(arguments.state_folder):
            state.probe()
    say("measuring takes a minute or two; the less else runs meanwhile, the better")
    with progress_bar() as on_progress:
        made = take_profile(blueprint, replace(EngineConfig(), **settings), on_progress)
    if keeps:
        with _told(arguments.state_folder):
            profile_file.write(state, made)
        say(f"kept in {state.path}")
    if picture is not None:
        _draw(made, picture)
    _print(made, as_json=bool(arguments.json))
    return Exit.OK


@contextmanager
def _told(folder: str | None) -> Iterator[None]:
    """Says which folder takes no files, and what to do about it."""
    try:
        yield
    except OSError as error:
        place = folder or "the user's cache folder"
        raise FileTrouble(
            f"cannot keep files in {place}: {why(error)}; give another with --state-folder, or {NONE}"
        ) from error


def _checked(picture: Path) -> Path:
    """The file for the picture, when it can be drawn: better said before measuring."""
    from importlib.util import find_spec

    if picture.suffix.lower() not in _PICTURES:
        raise UsageError(f"argument --plot: {picture} is neither {' nor '.join(_PICTURES)}; give one of these")
    if find_spec("matplotlib") is None:
        raise UsageError("argument --plot: matplotlib is not installed; get it with pip install 'edgemoe[plot]'")
    return picture


def _draw(made: Profile, picture: Path) -> None:
    from edgemoe.profile_picture import draw

    try:
        draw(made, picture)
    except OSError as error:
        raise FileTrouble(f"cannot write {picture}: {why(error)}; give another file with --plot") from error


def _print(made: Profile, *, as_json: bool) -> None:
    if as_json:
        put(json.dumps(made.to_dict(), indent=2) + "\n")
        return
    tables = [("passes", _POINTS, _points(made)), (_title(made), _WORTH, _worth(made))]
    if not sys.stdout.isatty():
        put("\n\n".join(f"{title}\n{columns([headings, *rows])}" for title, headings, rows in tables) + "\n")
        put(f"\n{_full_activation(made)}\n")
        return
    from rich.console import Console
    from rich.table import Table

    for title, headings, rows in tables:
        table = Table(*headings, title=title)
        for column in table.columns:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console(markup=False).print(table)
    put(f"{_full_activation(made)}\n")


def _full_activation(made: Profile) -> str:
    """From where on drafts want no new experts."""
    from edgemoe.moesd import full_activation

    shape = made.model.shape
    tokens = full_activation(shape.experts, shape.top_k)
    return f"{tokens} tokens that choose evenly want 95 % of a layer's {shape.experts} experts"


def _points(made: Profile) -> list[Sequence[str]]:
    """What was measured, each beside what the model says of it."""
    rows: list[Sequence[str]] = []
    for point in made.points:
        predicted = made.model.pass_seconds(point.total, point.experts, point.misses)
        seconds = (f"{1e3 * seconds:.1f} ms" for seconds in (point.seconds, predicted))
        share, experts = f"{point.cache_share:.0%}", f"{point.experts:.1f}"
        rows.append((str(point.batch), str(point.tokens), share, *seconds, experts, f"{point.misses:.1f}"))
    return rows


def _title(made: Profile) -> str:
    from edgemoe.prediction import ACCEPTANCE

    return f"predicted, all experts resident, {ACCEPTANCE:.0%} of the drafted tokens right, 3 and 8 drafted"


def _worth(made: Profile) -> list[Sequence[str]]:
    """What speculation is worth over batches, by the model."""
    from edgemoe.moesd import tokens_per_cycle
    from edgemoe.prediction import ACCEPTANCE

    rows: list[Sequence[str]] = []
    for batch in _BATCHES:
        row = [str(batch), f"{made.model.tokens_per_second(batch):.1f}", f"{made.model.activated(batch):.1f}"]
        for depth in (3, 8):
            row.append(f"{made.model.target_efficiency(batch, depth):.2f}")
            row.append(f"{made.model.speedup(batch, depth, tokens_per_cycle(ACCEPTANCE, depth)):.2f} x")
        rows.append(row)
    return rows
