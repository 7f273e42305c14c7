"""`edgemoe run`: answer a file of requests, one result line each, appended as it is ready."""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import replace

from edgemoe.cli.arguments import sampling_from
from edgemoe.cli.exits import Exit, FileTrouble, UsageError
from edgemoe.cli.loading import open_engine, open_ray_engines, say_lossy
from edgemoe.cli.output import say
from edgemoe.cli.render import counted
from edgemoe.cli.run.finished import Finished, read_finished
from edgemoe.cli.run.jobs import Jobs, settings_key
from edgemoe.cli.run.ledger import Ledger
from edgemoe.cli.run.outbox import Outbox, Outcome
from edgemoe.cli.run.progress import RunTally, display
from edgemoe.cli.run.requests import RequestReader
from edgemoe.cli.run.results import STANDARD_OUTPUT, Results
from edgemoe.cli.run.serving import Serving
from edgemoe.cli.run.source import Source
from edgemoe.cli.surface import BatchEngineView, EngineFactory


def run(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Answer every request. Raises FileTrouble for the files (before loading where it can), and what loading raises."""
    defaults = sampling_from(arguments)
    _refuse_contradictions(arguments)
    with (
        closing(Source.open(arguments.requests)) as source,
        closing(_open_results(arguments, source)) as results,
        closing(Ledger()) as ledger,
    ):
        key = settings_key(
            model=arguments.model,
            dtype=arguments.dtype,
            system=arguments.system_prompt,
            raw=bool(arguments.raw),
            sampling=defaults,
            template=arguments.chat_template_kwargs,
        )
        reader = RequestReader(
            defaults, system=arguments.system_prompt, template_kwargs=arguments.chat_template_kwargs or {}
        )
        jobs = Jobs(source, reader, key, ledger, results.name)
        finished = read_finished(arguments.output, ledger) if arguments.resume else Finished()
        # What there is for the results to belong to is checked before a model is loaded, where the input allows it.
        left = jobs.count() if finished.count else source.total
        if finished.count and left == 0:
            _begin(results, finished)
            say("no request is left to answer")
            return Exit.OK
        with closing(_open_engine(arguments, engine)) as loaded:
            say_lossy(loaded.plan)
            jobs.reader = replace(jobs.reader, chat_lines=loaded.has_chat_template and not arguments.raw)
            _begin(results, finished)
            return _serve_and_sum_up(arguments, loaded, jobs, left, results)


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.overwrite:
        raise UsageError("--resume goes on with OUT and --overwrite replaces it; give one of the two")
    if arguments.resume and arguments.output in (None, STANDARD_OUTPUT):
        raise UsageError("--resume needs the file of results to go on with; give it with -o")


def _open_results(arguments: argparse.Namespace, source: Source) -> Results:
    path = arguments.output
    if path is not None and source.is_file(path):
        raise FileTrouble(f"{path} is the file of requests itself; give another file with -o")
    return Results.open(path, overwrite=bool(arguments.overwrite), resume=bool(arguments.resume))


def _open_engine(arguments: argparse.Namespace, engine: EngineFactory | None) -> BatchEngineView:
    return open_engine(arguments, engine) if arguments.ray is None else open_ray_engines(arguments)


def _begin(results: Results, finished: Finished) -> None:
    results.begin(keep=finished.nbytes)
    if finished.torn_nbytes:
        say(f"the last line of {results.name} was not whole and is cut off ({counted(finished.torn_nbytes, 'byte')})")
    if finished.count:
        say(f"{results.name} has {counted(finished.count, 'result')} already")


def _serve_and_sum_up(
    arguments: argparse.Namespace, engine: BatchEngineView, jobs: Jobs, left: int | None, results: Results
) -> int:
    tally = RunTally(engine)
    verbose = bool(arguments.verbose)
    try:
        with display(tally, left, verbose=verbose, shares_terminal=results.on_terminal) as shown:

            def deliver(outcome: Outcome) -> None:
                results.write(outcome.line)
                tally.add(failed=outcome.failed)
                shown.finished(outcome)

            Serving(engine, jobs, Outbox(deliver, in_order=arguments.order == "input")).run()
    except KeyboardInterrupt:
        go_on = "" if arguments.output in (None, STANDARD_OUTPUT) else "; go on with --resume"
        say(f"interrupted; {results.name} keeps what was finished{go_on}")
        return Exit.INTERRUPTED
    finally:
        for line in tally.summary(jobs.skipped, verbose=verbose):
            say(line)
    return Exit.FAILED if tally.failed else Exit.OK
