"""How a run is getting on, on standard error: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from edgemoe.cli.output import say
from edgemoe.cli.render import Counts, counted, drafts, duration, harmless_line, steps
from edgemoe.cli.run.outbox import Outcome
from edgemoe.cli.surface import BatchEngineView
from edgemoe.cli.timed_notes import FIRST_NOTE, NEXT_NOTES
from edgemoe.results import hit_rate
from edgemoe.sizes import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class RunTally:
    """What a run has done so far: requests by its own count, tokens and experts by the engine's.

    May be read from any thread while the engine is open.
    """

    def __init__(self, engine: BatchEngineView) -> None:
        self.finished = 0
        self.failed = 0
        self._engine = engine
        self._before = engine.stats
        self._started = time.monotonic()

    def add(self, *, failed: bool) -> None:
        """Count one request."""
        self.finished += 1
        self.failed += failed

    def summary(self, skipped: int = 0, *, verbose: bool = False) -> list[str]:
        """The whole run in a few lines, one more with `verbose`; `skipped` requests had a result before."""
        took = time.monotonic() - self._started
        counts = f"{counted(self.finished, 'request')}, {self.failed} failed, in {duration(took)}"
        if skipped:
            counts += f"; {skipped} more had a result already"
        stats, before = self._engine.stats, self._before
        prompt = stats.tokens_prompt - before.tokens_prompt
        generated = stats.tokens_generated - before.tokens_generated
        if not prompt and not generated:
            return [counts]
        moved = (stats.bytes_loaded - before.bytes_loaded) / max(1, generated)
        speeds = (
            f"prompt {counted(prompt, 'token')} at {prompt / max(took, 1e-9):.1f}/s, "
            f"generated {counted(generated, 'token')} at {generated / max(took, 1e-9):.1f}/s, "
            f"hit rate {self._hit_rate():.1%}, {format_bytes(moved)} moved for a generated token"
        )
        batch = f"batch {stats.batch}: {stats.batch_reason}"
        saved = stats.prefix_tokens - before.prefix_tokens
        if saved:
            batch += f"; {counted(saved, 'prompt token')} shared with another request"
        done = Counts.of(stats).since(Counts.of(before))
        more = [steps(done)] if verbose else []
        return [counts, speeds, batch, *more, drafts(done, stats.speculation)]

    def now(self) -> str:
        """A few words for the live display."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        generated = self._engine.stats.tokens_generated - self._before.tokens_generated
        return f"{generated / seconds:.1f} tokens/s, hit rate {self._hit_rate():.1%}" if generated else ""

    def _hit_rate(self) -> float:
        stats, before = self._engine.stats, self._before
        return hit_rate(stats.hits - before.hits, stats.misses - before.misses)


class Display(Protocol):
    """What a run tells about itself."""

    def finished(self, outcome: Outcome) -> None:
        """A request is done, and its result is written."""


@contextlib.contextmanager
def display(tally: RunTally, total_requests: int | None, *, verbose: bool, shares_terminal: bool) -> Iterator[Display]:
    """The display that suits standard error. `shares_terminal`: the results scroll by there, so no bar."""
    if not sys.stderr.isatty():
        with _lines(tally, total_requests):
            yield _Plain(verbose)
        return
    if shares_terminal:
        yield _Plain(verbose)
        return
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Note(progress.ProgressColumn):
        """What the tally says, asked again at every refresh."""

        def render(self, task: progress.Task) -> Text:
            return Text(tally.now())

    counts = (progress.MofNCompleteColumn(), progress.TextColumn("requests"), progress.BarColumn())
    console = Console(stderr=True, markup=False, highlight=False)
    with progress.Progress(*counts, progress.TimeElapsedColumn(), Note(), console=console, transient=True) as bar:
        yield _Live(bar, bar.add_task("", total=total_requests), verbose)


@contextlib.contextmanager
def _lines(tally: RunTally, total_requests: int | None) -> Iterator[None]:
    """Within the block, says every now and then how far the run is: what nobody watches live is read in a file."""
    over = threading.Event()

    def tell() -> None:
        wait = FIRST_NOTE
        while not over.wait(wait):
            known = "" if total_requests is None else f" of {total_requests}"
            parts = [f"{tally.finished}{known} answered", f"{tally.failed} failed" if tally.failed else "", tally.now()]
            say(", ".join(part for part in parts if part))
            wait = NEXT_NOTES

    thread = threading.Thread(target=tell, name="edgemoe-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Plain:
    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose

    def finished(self, outcome: Outcome) -> None:
        if self._verbose:
            say(_line(outcome))


class _Live:
    def __init__(self, bar: Progress, task: TaskID, verbose: bool) -> None:
        self._bar, self._task, self._verbose = bar, task, verbose

    def finished(self, outcome: Outcome) -> None:
        if self._verbose:
            self._bar.console.print(_line(outcome), soft_wrap=True)
        self._bar.update(self._task, advance=1)


def _line(outcome: Outcome) -> str:
    return harmless_line(f"{outcome.custom_id}: {outcome.said}")
