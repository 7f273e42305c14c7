"""How far loading is, or another long job on bytes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from edgemoe.cli.timed_notes import TimedNotes
from edgemoe.results import Progress
from edgemoe.sizes import format_bytes

_MIN_BAR, _MAX_BAR = 4, 40
"""Columns of the bar of loading."""
_BESIDE_BAR = 56
"""Columns for what stands beside it: the stage, bytes of bytes, and the speed."""


@contextlib.contextmanager
def progress_bar(first: str = "loading") -> Iterator[Callable[[Progress], None]]:
    """A bar on standard error within the block, when that is a terminal, else a line now and then.

    The bar begins with the stage `first`. A stage without a total has a bar that only moves.
    """
    if not sys.stderr.isatty():
        notes = TimedNotes()
        yield lambda progress: notes.offer(lambda: _line(progress))
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, ProgressColumn, Task, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as ProgressBar
    from rich.table import Column
    from rich.text import Text

    class Bytes(DownloadColumn):
        """Nothing, where there is no total to compare with."""

        def render(self, task: Task) -> Text:
            return Text() if task.total is None else super().render(task)

    class Speed(TransferSpeedColumn):
        """Nothing, where it is not known."""

        def render(self, task: Task) -> Text:
            return Text() if task.total is None or task.speed is None else super().render(task)

    console = Console(stderr=True)
    parts: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=max(_MIN_BAR, min(_MAX_BAR, console.width - _BESIDE_BAR))),
        Bytes(binary_units=True, table_column=Column(no_wrap=True)),
    ]
    if console.width > _BESIDE_BAR:
        parts.append(Speed(table_column=Column(no_wrap=True)))
    with ProgressBar(*parts, console=console, transient=True) as bar:
        task = bar.add_task(first, total=None)

        def show(progress: Progress) -> None:
            bar.update(task, description=progress.stage, completed=progress.done, total=progress.total or None)

        yield show


def _line(progress: Progress) -> str:
    of = f": {format_bytes(progress.done)} of {format_bytes(progress.total)}" if progress.total else ""
    return f"{progress.stage}{of}"
