"""`edgemoe run`: answer a file of requests, one result line each, appended as it is ready."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from edgemoe.cli.answers import CANCELLED, ask
from edgemoe.cli.arguments import sampling_from
from edgemoe.cli.exits import Exit, FileTrouble
from edgemoe.cli.interruption import Interruption
from edgemoe.cli.loading import open_engine, say
from edgemoe.cli.progress import Display, Tally, display
from edgemoe.cli.requests import BadLine, Request, RequestReader
from edgemoe.cli.results import Record, Results, failure, success
from edgemoe.cli.source import Source
from edgemoe.cli.surface import EngineFactory, EngineView
from edgemoe.errors import RequestError

if TYPE_CHECKING:
    from edgemoe import Timings


def run(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Answer every request. Raises FileTrouble for the files (before loading where it can), and what loading raises."""
    defaults = sampling_from(arguments)
    with (
        closing(Source.open(arguments.requests)) as source,
        closing(_open_results(arguments, source)) as results,
        closing(open_engine(arguments, engine)) as loaded,
    ):
        chat_lines = loaded.has_chat_template and not arguments.raw
        reader = RequestReader(defaults, system=arguments.system_prompt, chat_lines=chat_lines)
        results.begin()
        requests = reader.read(source.lines(), jsonl=source.is_jsonl)
        return _serve_and_sum_up(loaded, requests, results, source.total, verbose=bool(arguments.verbose))


def _open_results(arguments: argparse.Namespace, source: Source) -> Results:
    path = arguments.output
    if path is not None and source.is_file(path):
        raise FileTrouble(f"{path} is the file of requests itself; give another file with -o")
    return Results.open(path, overwrite=bool(arguments.overwrite))


def _serve_and_sum_up(
    engine: EngineView, requests: Iterable[Request | BadLine], results: Results, count: int | None, *, verbose: bool
) -> int:
    tally = Tally()
    try:
        with display(tally, count, verbose=verbose, shares_terminal=results.on_terminal) as shown:
            for request in requests:
                _serve(engine, request, results, tally, shown)
    except KeyboardInterrupt:
        say(f"interrupted; {results.name} keeps what was finished")
        return Exit.INTERRUPTED
    finally:
        say(tally.summary())
    return Exit.FAILED if tally.failed else Exit.OK


class _Outcome(NamedTuple):
    record: Record
    timings: Timings | None
    problem: str | None


def _serve(engine: EngineView, request: Request | BadLine, results: Results, tally: Tally, shown: Display) -> None:
    """Answer one request and write its record. Raises KeyboardInterrupt after a Ctrl-C, FileTrouble."""
    with Interruption(engine.cancel) as interruption:
        outcome = _outcome(engine, request, interruption, shown)
        if outcome is not None:
            results.write(outcome.record)
            tally.add(outcome.timings, failed=outcome.problem is not None)
            shown.finished(request.custom_id, outcome.timings, outcome.problem)
    if interruption.requested:
        raise KeyboardInterrupt


def _outcome(
    engine: EngineView, request: Request | BadLine, interruption: Interruption, shown: Display
) -> _Outcome | None:
    """What is to be written for a request; None when it was cancelled."""
    if isinstance(request, BadLine):
        return _Outcome(failure(request), None, request.message)
    try:
        prompt = request.prompt if request.messages is None else engine.chat_prompt(request.messages)
        answer = ask(engine, prompt, request.sampling, interruption, lambda chunk: shown.running(chunk.timings))
    except RequestError as error:
        problem = str(error)
        return _Outcome(failure(BadLine(request.custom_id, "invalid_request", problem)), None, problem)
    if answer.finish_reason == CANCELLED:
        return None
    record = success(request, answer, model=engine.plan.model, has_tokenizer=engine.has_tokenizer)
    return _Outcome(record, answer.timings, None)
