"""`edgemoe eval`: what lossy settings cost in quality, against the exact model on the same text."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, cast

from edgemoe.cli.chat.text_file import piped_text, read_text
from edgemoe.cli.exits import Exit, UsageError
from edgemoe.cli.loading import open_engine
from edgemoe.cli.output import put
from edgemoe.cli.render import columns
from edgemoe.cli.surface import EngineFactory
from edgemoe.cli.timed_notes import TimedNotes
from edgemoe.errors import CheckpointError

if TYPE_CHECKING:
    from edgemoe import Engine
    from edgemoe.measure.quality import Quality

_HEADINGS = ("what", "how much", "of what")
_STANDARD_INPUT = "-"
_EXACT = "exact"


def evaluate(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Print what the settings cost on standard output.

    Raises UsageError, FileTrouble and, for models that cannot be compared, CheckpointError before anything is loaded.
    """
    if arguments.questions is not None and arguments.questions < 0:
        raise UsageError(f"argument --questions: {arguments.questions} is below 0; give 0 to ask none")
    texts = _texts(arguments.text)
    if _reference(arguments) is not None:
        from edgemoe.measure.evaluation import check_comparable

        check_comparable(arguments.model, arguments.against, offline=bool(arguments.offline))
    quality = _measured(arguments, engine, texts)
    if arguments.json:
        put(json.dumps(quality.to_dict(), indent=2) + "\n")
    elif sys.stdout.isatty():
        _print_table(quality)
    else:
        put(columns([_HEADINGS, *quality.lines()]) + "\n")
    return Exit.OK


def _texts(files: list[str] | None) -> list[str] | None:
    if files is not None and files.count(_STANDARD_INPUT) > 1:
        raise UsageError("argument --text: standard input can be read once; give - once")
    if files is None:
        return None
    return [piped_text() if file == _STANDARD_INPUT else read_text(file) for file in files]


def _reference(arguments: argparse.Namespace) -> str | None:
    """The checkpoint to compare with; None is the same one with nothing lossy."""
    against: str | None = arguments.against
    return None if against == _EXACT else against


def _measured(arguments: argparse.Namespace, engine: EngineFactory | None, texts: list[str] | None) -> Quality:
    from edgemoe.measure.evaluation import QUESTIONS, TOKENS, Evaluation, eval_texts_for

    questions = arguments.questions
    if questions is None:
        questions = QUESTIONS if arguments.model is None else 0
    with ExitStack() as kept:
        with closing(_open(arguments, engine, questions)) as loaded, _progress() as on_progress:
            eval_texts = eval_texts_for(loaded, texts, arguments.tokens or TOKENS)
            evaluation = kept.enter_context(closing(Evaluation(eval_texts, questions)))
            evaluation.measure(loaded, on_progress)
            if _reference(arguments) is None and not loaded.plan.quantised:
                return evaluation.against(loaded, on_progress)
        # Only now, when the first has given its memory back.
        lossless = {"budget": None, "experts": None, "dense": None}
        other = argparse.Namespace(**vars(arguments) | lossless | {"model": _reference(arguments) or arguments.model})
        with closing(_open(other, engine, questions)) as reference, _progress() as on_progress:
            return evaluation.against(reference, on_progress)


def _open(arguments: argparse.Namespace, engine: EngineFactory | None, questions: int) -> Engine:
    """An engine that can be asked what will be asked of it. The caller closes it."""
    # The measurement looks into the engine, as only the library's own lets it.
    loaded = cast("Engine", open_engine(arguments, engine))
    lacking = None
    if not loaded.has_tokenizer:
        lacking = "tokenizer, so that it cannot read a text: measure token ids with edgemoe.measure.evaluation.evaluate"
    elif questions and not loaded.has_chat_template:
        lacking = "chat template, so that the tasks cannot be asked: leave --questions out, or give 0"
    if lacking is not None:
        loaded.close()
        raise CheckpointError(f"{loaded.plan.model} has no {lacking}")
    return loaded


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error within the block, when that is a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        notes = TimedNotes()
        yield lambda what, done, total: notes.offer(lambda: f"{what}: {done} of {total}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show


def _print_table(quality: Quality) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEADINGS)
    table.columns[1].justify = "right"
    for row in quality.lines():
        table.add_row(*row)
    Console(markup=False).print(table)
