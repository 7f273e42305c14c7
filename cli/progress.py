"""How a run is getting on, on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from edgemoe.cli.loading import say
from edgemoe.cli.render import counted, duration, experts, speeds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from edgemoe import Timings


@dataclass
class Tally:
    """What a run has done so far. `timings` is the sum over its finished requests."""

    finished: int = 0
    failed: int = 0
    timings: Timings | None = None
    started: float = field(default_factory=time.monotonic)
    _timed_tokens: float = 0.0

    def add(self, timings: Timings | None, *, failed: bool) -> None:
        """Count one request."""
        self.finished += 1
        self.failed += failed
        if timings is not None:
            self.timings = timings if self.timings is None else _sum(self.timings, timings)
            # Not every generated token counts for a request's speed, so the sum's own speed would be wrong.
            self._timed_tokens += timings.generated_per_second * timings.generate_seconds

    @property
    def generated_per_second(self) -> float:
        """Generated tokens a second, over all requests."""
        seconds = self.timings.generate_seconds if self.timings else 0.0
        return self._timed_tokens / seconds if seconds else 0.0

    def summary(self) -> str:
        """One line about the whole run."""
        took = duration(time.monotonic() - self.started)
        counts = f"{counted(self.finished, 'request')}, {self.failed} failed, in {took}"
        return f"{counts}; {speeds(self.timings, self.generated_per_second)}" if self.timings else counts


def _sum(one: Timings, other: Timings) -> Timings:
    names = [entry.name for entry in dataclasses.fields(one)]
    return dataclasses.replace(one, **{name: getattr(one, name) + getattr(other, name) for name in names})


class Display(Protocol):
    """What a run tells about itself."""

    def running(self, timings: Timings) -> None:
        """The current request has come this far."""

    def finished(self, custom_id: str, timings: Timings | None, problem: str | None) -> None:
        """A request is done; `problem` says why it failed, if it did."""


@contextlib.contextmanager
def display(tally: Tally, total_requests: int | None, *, verbose: bool, shares_terminal: bool) -> Iterator[Display]:
    """The display that suits standard error. `shares_terminal`: the results scroll by there, so no bar."""
    if not sys.stderr.isatty() or shares_terminal:
        yield _Plain(verbose)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parts = (
        MofNCompleteColumn(),
        TextColumn("requests"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*parts, console=Console(stderr=True, markup=False, highlight=False), transient=True) as bar:
        yield _Live(bar, bar.add_task("", total=total_requests, note=""), tally, verbose)


class _Plain:
    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose

    def running(self, timings: Timings) -> None:
        return

    def finished(self, custom_id: str, timings: Timings | None, problem: str | None) -> None:
        if self._verbose:
            say(_line(custom_id, timings, problem))


class _Live:
    def __init__(self, bar: Progress, task: TaskID, tally: Tally, verbose: bool) -> None:
        self._bar, self._task, self._tally, self._verbose = bar, task, tally, verbose

    def running(self, timings: Timings) -> None:
        so_far = dataclasses.replace(self._tally)
        so_far.add(timings, failed=False)
        if so_far.timings is not None:
            note = f"{so_far.generated_per_second:.1f} tokens/s, {experts(so_far.timings)}"
            self._bar.update(self._task, note=note)

    def finished(self, custom_id: str, timings: Timings | None, problem: str | None) -> None:
        if self._verbose:
            self._bar.console.print(_line(custom_id, timings, problem), soft_wrap=True)
        self._bar.update(self._task, advance=1)


def _line(custom_id: str, timings: Timings | None, problem: str | None) -> str:
    if problem is not None:
        return f"{custom_id}: failed: {problem}"
    return f"{custom_id}: {speeds(timings)}" if timings else f"{custom_id}: done"
