"""`edgemoe profile`: measures a model on this machine and keeps what says when speculation pays."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.checkpoint.state_folder import NONE, keeps_nothing
from edgemoe.cli.arguments import model_settings
from edgemoe.cli.exits import Exit, FileTrouble, UsageError, why
from edgemoe.cli.interruption import Interruption
from edgemoe.cli.loading import say_which_model
from edgemoe.cli.output import put, say
from edgemoe.cli.render import columns
from edgemoe.cli.surface import EngineFactory
from edgemoe.cli.wording import in_options

if TYPE_CHECKING:
    from edgemoe.measure.profiler import ProfileProgress
    from edgemoe.plan.performance_model import Outlook
    from edgemoe.plan.profile import CardSpeed, Profile

_PICTURES = (".png", ".svg")
_DEPTHS = (3, 8)
_POINTS = ("batch", "tokens each", "slots", "measured", "predicted", "experts a layer", "misses")
_WORTH = (
    "batch", "tokens/s", "experts a layer",
    *(f"{what} at {depth}" for depth in _DEPTHS for what in ("efficiency", "speed-up")),
)  # fmt: skip


def profile(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Measure, fit, keep, and print on standard output. No engine is needed.

    Raises UsageError for a picture that cannot be made, FileTrouble where the profile or the picture cannot be
    kept, and CheckpointError and PlanError as loading does.
    """
    picture = None if arguments.plot is None else _checked(Path(arguments.plot))
    say_which_model(arguments)
    from edgemoe.checkpoint.blueprint import blueprint_for
    from edgemoe.checkpoint.state_folder import StateFolder
    from edgemoe.config import EngineConfig
    from edgemoe.measure.profiler import take_profile
    from edgemoe.plan.profile import write_profile

    settings = model_settings(arguments)
    model = settings.pop("model", None)
    config = replace(EngineConfig(), **settings)
    blueprint = blueprint_for(model, config)
    state = StateFolder.of(blueprint.checkpoint, arguments.state_folder)
    keeps = not keeps_nothing(arguments.state_folder)
    if keeps:
        with _told(arguments.state_folder):
            state.probe()
    say("measuring takes a minute or two; the less else runs meanwhile, the better")
    with _bar() as show:
        made = take_profile(blueprint, config, show)
    if keeps:
        with _told(arguments.state_folder):
            write_profile(state, made)
        say(f"kept in {state.path}")
    _print(made, as_json=bool(arguments.json))
    # Last: what was measured is kept and told by now, whatever becomes of the picture.
    if picture is not None:
        _draw(made, picture)
    return Exit.OK


@contextmanager
def _bar() -> Iterator[Callable[[ProfileProgress], None]]:
    """What is measured, and how far that is: a bar on a terminal, a line for each quarter elsewhere.

    The first Ctrl-C ends the measurement before its next pass, so that none is torn.
    """
    stopped = threading.Event()
    with Interruption(stopped.set), _shown() as show:

        def progressed(progress: ProfileProgress) -> None:
            if stopped.is_set() and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            show(progress)

        yield progressed


@contextmanager
def _shown() -> Iterator[Callable[[ProfileProgress], None]]:
    if not sys.stderr.isatty():
        quarters = [0]

        def say_quarter(progress: ProfileProgress) -> None:
            if int(4 * progress.done) > quarters[0]:
                quarters[0] = int(4 * progress.done)
                say(f"{quarters[0] / 4:.0%} is measured")

        yield say_quarter
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    parts = (
        SpinnerColumn(), BarColumn(20), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    )  # fmt: skip
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("opening", total=1.0)

        def show(progress: ProfileProgress) -> None:
            bar.update(task, description=progress.activity, completed=progress.done, refresh=True)

        yield show


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
    folder = picture.absolute().parent
    if not folder.is_dir():
        raise FileTrouble(f"cannot write {picture}: there is no folder {folder}; give another file with --plot")
    if picture.is_dir() or not os.access(picture if picture.exists() else folder, os.W_OK):
        raise FileTrouble(f"cannot write {picture}: it is a folder, or write-protected; give another file with --plot")
    return picture


def _draw(made: Profile, picture: Path) -> None:
    from edgemoe.plan.profile_plot import draw

    try:
        draw(made, picture)
    except OSError as error:
        raise FileTrouble(f"cannot write {picture}: {why(error)}; give another file with --plot") from error


def _print(made: Profile, *, as_json: bool) -> None:
    if as_json:
        put(json.dumps(made.to_dict() | {"predicted": _predicted(made)}, indent=2) + "\n")
        return
    tables: list[tuple[str, Sequence[str], list[Sequence[str]]]] = [("passes", _POINTS, _points(made))]
    tables += [(_title(share), _WORTH, _worth(found)) for share, found in _outlooks(made).items()]
    if not sys.stdout.isatty():
        put("\n\n".join(f"{title}\n{columns([headings, *rows])}" for title, headings, rows in tables) + "\n")
        put("".join(f"\n{line}\n" for line in _told_last(made)))
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
    put("".join(f"{line}\n" for line in _told_last(made)))


def _predicted(made: Profile) -> dict[str, Any]:
    """What the tables tell beside the points, for JSON."""
    from edgemoe.plan.prediction import ACCEPTANCE
    from edgemoe.plan.verdict import verdict

    slots = [
        {"cache_share": share, "batches": [asdict(each) for each in found]} for share, found in _outlooks(made).items()
    ]
    return {"acceptance": ACCEPTANCE, "full_activation": _full_activation(made), "slots": slots} | {
        "verdict": [in_options(sentence) for sentence in verdict(made).sentences]
    }


def _outlooks(made: Profile) -> dict[float, list[Outlook]]:
    """What the model says over batches: for all experts resident, and for the slots that there were, where fewer."""
    from edgemoe.plan.prediction import ACCEPTANCE
    from edgemoe.plan.verdict import BATCHES

    there = max(point.cache_share for point in made.points)
    return {
        share: [made.model.outlook(batch, share, ACCEPTANCE, _DEPTHS) for batch in BATCHES] for share in (1.0, there)
    }


def _full_activation(made: Profile) -> int:
    """Tokens from which on drafts want next to no new experts."""
    from edgemoe.plan.moesd import full_activation

    return full_activation(made.model.shape.experts, made.model.shape.top_k)


def _full_activation_told(made: Profile) -> str:
    experts = made.model.shape.experts
    return f"{_full_activation(made)} tokens that choose evenly want 95 % of a layer's {experts} experts"


def _told_last(made: Profile) -> list[str]:
    """What comes below the tables; the verdict is the last."""
    from edgemoe.plan.verdict import verdict

    card = [_card_told(made.card)] if made.card else []
    return [*card, _full_activation_told(made), *map(in_options, verdict(made).sentences)]


def _card_told(card: CardSpeed) -> str:
    """What was measured of the device and of the CPU beside it, and what follows for missing experts."""
    pcie, pcie_beside, vram, cpu, cpu_beside = (
        f"{speed / 1e9:.1f} GB/s" for speed in (card.pcie, card.pcie_beside, card.vram, card.cpu, card.cpu_beside)
    )
    device = (
        f"the device reads its memory at {vram} and takes a kernel every {1e6 * card.launch_seconds:.1f} us; "
        f"the host has what it tells after {1e6 * card.read_seconds:.1f} us"
    )
    if not card.cpu:
        return f"{device}\nrecords are copied at {pcie}; the CPU has no kernels for them"
    return (
        f"{device}\nrecords are copied at {pcie}, beside the CPU's kernels at {pcie_beside}; "
        f"these read records at {cpu}, beside copies at {cpu_beside}\n"
        f"by these bandwidths {card.cpu_share:.0%} of the missing experts are the CPU's to compute"
    )


def _points(made: Profile) -> list[Sequence[str]]:
    """What was measured, each beside what the model says of it."""
    rows: list[Sequence[str]] = []
    for point in made.points:
        predicted = made.model.pass_seconds(point.total, point.experts, point.misses)
        seconds = (f"{1e3 * seconds:.1f} ms" for seconds in (point.seconds, predicted))
        share, experts = f"{point.cache_share:.0%}", f"{point.experts:.1f}"
        rows.append((str(point.batch), str(point.tokens), share, *seconds, experts, f"{point.misses:.1f}"))
    return rows


def _title(share: float) -> str:
    from edgemoe.plan.prediction import ACCEPTANCE

    slots = "all experts resident" if share == 1 else f"slots for {share:.0%} of the experts"
    depths = " and ".join(map(str, _DEPTHS))
    return f"predicted, {slots}, {ACCEPTANCE:.0%} of the drafted tokens right, {depths} drafted"


def _worth(outlooks: Sequence[Outlook]) -> list[Sequence[str]]:
    """What speculation is worth over batches, by the model."""
    rows: list[Sequence[str]] = []
    for found in outlooks:
        row = [str(found.batch), f"{found.tokens_per_second:.1f}", f"{found.experts:.1f}"]
        for worth in found.drafts:
            row += [f"{worth.target_efficiency:.2f}", f"{worth.speedup:.2f} x"]
        rows.append(row)
    return rows
