"""The traffic of a run: requests to the engine, its answers to the outbox."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgemoe.cli.exits import FileTrouble
from edgemoe.cli.interruption import Interruption
from edgemoe.cli.output import say
from edgemoe.cli.render import counted, speeds
from edgemoe.cli.run.jobs import Job, Jobs
from edgemoe.cli.run.outbox import Outbox, Outcome
from edgemoe.cli.run.records import failure, line_of, success
from edgemoe.cli.run.requests import BadLine, RequestLine
from edgemoe.cli.surface import CANCELLED, BatchEngineView
from edgemoe.errors import RequestError

if TYPE_CHECKING:
    from edgemoe import Completion, Sampling
    from edgemoe.checkpoint.tokenizer import Prompt


@dataclass
class _Ticket:
    """A request in the engine's hands, and what came of its choices so far."""

    position: int
    record_id: str
    request: RequestLine
    answers: dict[int, Completion | RequestError] = field(default_factory=dict)


class Serving:
    """One run. It holds what is in flight and nothing else.

    The first Ctrl-C, or a request to end from a job scheduler, lets what is in flight finish; the second does not.
    """

    def __init__(self, engine: BatchEngineView, jobs: Jobs, outbox: Outbox) -> None:
        self._engine = engine
        self._ready = jobs.ready
        self._jobs = iter(jobs)
        self._outbox = outbox
        self._interruption = Interruption(self._wind_down, engine.cancel, signals=(signal.SIGINT, signal.SIGTERM))
        self._flying: dict[int, tuple[_Ticket, int]] = {}
        """By the engine's index: a ticket, and the number of its choice."""
        self._unfinished: set[int] = set()
        """The positions of requests that were begun and have no outcome."""
        self._positions = 0
        self._exhausted = False
        self._torn = False
        """Whether reading the jobs was interrupted, so that nobody knows whether there are more."""
        self._trouble: FileTrouble | None = None
        """Why no more jobs can be read."""

    def run(self) -> None:
        """Serve every job. Raises what the jobs, the engine and the outbox raise.

        Once interrupted, it takes no more jobs, and what the engine then breaks off leaves no outcome; at the end it
        raises KeyboardInterrupt, unless every job has its outcome all the same. Where the jobs cannot be read to their
        end, those that were read are served first.
        """
        with self._interruption:
            while not self._exhausted:
                self._flying.clear()
                with closing(self._engine.generate_batch(self._round())) as answers:
                    for index, answer in answers:
                        if self._interruption.count > 1:
                            # A cancel that came before the generations began was lost on the engine.
                            self._engine.cancel()
                        self._take(*self._flying.pop(index), answer)
            if self._interruption.requested and self._has_more():
                raise KeyboardInterrupt
        if self._trouble is not None:
            raise self._trouble

    def _has_more(self) -> bool:
        """Whether something was left undone, or may have been: an input that is still being written may go on."""
        if self._unfinished or self._torn or not self._ready():
            return True
        try:
            with self._interruption.waiting():
                return next(self._jobs, None) is not None
        except KeyboardInterrupt:
            return True

    def _wind_down(self) -> None:
        running = min(len(self._flying), self._engine.stats.batch)
        self._engine.cancel(running=False)
        if running:
            say(f"finishing {running} in flight; press Ctrl-C again to stop at once")

    def _round(self) -> Iterator[tuple[Prompt, Sampling]]:
        """What to generate next, until there is no more, or until to read on would wait for others or hold too much.

        The next round begins when all that is in flight has ended, so it can always go on.
        """
        index = 0
        while not self._flying or (self._ready() and not self._outbox.is_full):
            job = self._next_job()
            if job is None:
                self._exhausted = True
                return
            position, self._positions = self._positions, self._positions + 1
            if isinstance(job.request, BadLine):
                self._outbox.put(position, _failed(job.record_id, job.request))
                continue
            ticket = _Ticket(position, job.record_id, job.request)
            self._unfinished.add(position)
            for choice, sampling in enumerate(job.request.samplings()):
                if self._interruption.requested:
                    return
                self._flying[index] = (ticket, choice)
                index += 1
                yield job.request.asked, sampling

    def _next_job(self) -> Job | None:
        """The next job; None at the end and after a Ctrl-C."""
        if self._interruption.requested:
            return None
        try:
            with self._interruption.waiting():
                return next(self._jobs, None)
        except KeyboardInterrupt:
            self._torn = True
        except FileTrouble as error:
            self._trouble = error
        return None

    def _take(self, ticket: _Ticket, choice: int, answer: Completion | RequestError) -> None:
        """Note one choice; with the last one, put the request's outcome into the outbox unless it was broken off."""
        ticket.answers[choice] = answer
        request = ticket.request
        if len(ticket.answers) < request.choices:
            return
        finished: list[Completion] = []
        for number in range(request.choices):
            each = ticket.answers[number]
            if isinstance(each, RequestError):
                bad = BadLine(request.custom_id, "invalid_request", str(each))
                self._put(ticket, _failed(ticket.record_id, bad))
                return
            finished.append(each)
        if all(each.finish_reason != CANCELLED for each in finished):
            self._put(ticket, self._answered(ticket, finished))

    def _put(self, ticket: _Ticket, outcome: Outcome) -> None:
        self._outbox.put(ticket.position, outcome)
        self._unfinished.discard(ticket.position)

    def _answered(self, ticket: _Ticket, answers: list[Completion]) -> Outcome:
        record = success(
            ticket.record_id,
            ticket.request,
            answers,
            model=self._engine.plan.model,
            has_tokenizer=self._engine.has_tokenizer,
        )
        if len(answers) == 1:
            said = speeds(answers[0].timings)
        else:
            tokens = sum(answer.timings.generated_tokens for answer in answers)
            said = f"{len(answers)} choices, generated {counted(tokens, 'token')}"
        return Outcome(ticket.request.custom_id, line_of(record), said)


def _failed(record_id: str, bad: BadLine) -> Outcome:
    return Outcome(bad.custom_id, line_of(failure(record_id, bad)), f"failed: {bad.message}", failed=True)
