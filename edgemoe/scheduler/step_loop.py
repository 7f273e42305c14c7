"""One step after the other: schedule, propose, run, commit, learn."""

from __future__ import annotations

import time
from collections.abc import Callable

from edgemoe.draft.proposal import StepReport
from edgemoe.draft.speculation import Speculation
from edgemoe.errors import is_out_of_memory, without_frames
from edgemoe.request.request import Request
from edgemoe.scheduler.scheduler import Scheduler
from edgemoe.scheduler.step import Committed, ScheduledStep, StepOutputs
from edgemoe.scheduler.step_runner import StepRunner


class PassAborted(BaseException):
    """Nobody waits for what the pass computes. Raised between two of its layers.

    No Exception: what asks whether a model's code fails must not take it for an answer.
    """


class StepLoop:
    """Drives the requests of one engine. Used by one thread at a time."""

    def __init__(self, scheduler: Scheduler, speculation: Speculation, runner: StepRunner) -> None:
        self.scheduler = scheduler
        self.speculation = speculation
        self.runner = runner
        self.current: ScheduledStep | None = None
        """The step that runs now."""
        self._committing = False

    def add(self, request: Request) -> None:
        """Puts a request in the waiting queue."""
        self.scheduler.add(request)

    def step(self) -> None:
        """Runs one step, where there is one.

        When it fails, every request of the step gets the error and the others go on. Where the pass found no memory,
        its requests begin again with more, a few times. A PassAborted ends the requests with the replies so far. Raised
        is only what ends the thread.
        """
        step = self.scheduler.schedule()
        self._forget_departed()
        if not step.parts:
            return
        started = time.perf_counter()
        self.current, self._committing = step, False
        try:
            tokens = self._run(step)
        except PassAborted:
            self.scheduler.abort(step)
            self.speculation.abandon()
        except BaseException as error:
            without_frames(error)
            # What a step has committed cannot be taken back.
            if self._committing or not is_out_of_memory(error) or not self.scheduler.relieve(step):
                self.scheduler.fail(step, error)
            self.speculation.abandon()
            if not isinstance(error, Exception):
                raise
        else:
            seconds, totals = time.perf_counter() - started, self.scheduler.totals
            totals.steps += 1
            totals.seconds += seconds
            self.scheduler.size.observe(len(step.parts), tokens, seconds)
        finally:
            self.current = None
            self.settle()

    def cancel(self, ends: Callable[[Request], bool]) -> None:
        """Ends the requests for which `ends`, with the replies so far. May be called while a step runs."""
        self.scheduler.cancel(ends)
        if self.current is None:
            self.settle()

    def fail(self, error: BaseException) -> None:
        """Ends every request with `error`."""
        self.scheduler.fail_all(error)
        self.settle()

    @property
    def nobody_waits(self) -> bool:
        """Whether every request of the step that runs now has ended."""
        return self.current is not None and all(request.finished for request, _ in self.current.parts)

    def settle(self) -> None:
        """Lets go of requests that have ended; no step may run."""
        self.scheduler.release()
        self._forget_departed()

    def close(self) -> None:
        """Frees the KV caches and lets go of the models."""
        self.scheduler.close()
        self.speculation.close()
        # It holds the model. Totals may still be read by a thread that did not see the end coming.
        del self.runner

    def _run(self, step: ScheduledStep) -> int:
        """Proposes, runs, commits and learns; returns the tokens that all replies got."""
        # What a draft prefetches counts for the step that verifies it.
        before = self.runner.counters.copy()
        proposal = self.speculation.propose(step.draft_limits, mixed=step.mixed)
        started = time.perf_counter()
        outputs = self.runner.run(step, proposal.trees, before)
        self._committing = True
        committed = self.scheduler.commit(step, proposal.trees, outputs)
        self.speculation.learn(proposal, _report(outputs, committed, time.perf_counter() - started))
        return committed.tokens

    def _forget_departed(self) -> None:
        for request in self.scheduler.departed():
            self.speculation.forget(request)


def _report(outputs: StepOutputs, committed: Committed, seconds: float) -> StepReport:
    """What speculation learns of a step; `seconds` are those of its pass and its commit."""
    decoding = [item for item in outputs.inputs if item.every or len(item.tokens) == 1]
    return StepReport(
        verified=committed.verified,
        sequences=len(decoding),
        tokens=sum(len(item.tokens) for item in outputs.inputs),
        prompt_tokens=sum(len(item.tokens) for item in outputs.inputs) - sum(len(item.tokens) for item in decoding),
        seconds=seconds,
        waited=outputs.link_wait_seconds,
    )
