"""What runs on a node of a cluster: one engine, and a mailbox for each batch of requests that is sent to it.

It does not know Ray, nor that there are other nodes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from edgemoe.errors import EdgeMoEError, RequestError
from edgemoe.results import Completion, Progress, Stats, Timings
from edgemoe.sampling import Sampling
from edgemoe.version import __version__

if TYPE_CHECKING:
    from edgemoe.checkpoint.tokenizer import Prompt
    from edgemoe.engine import Engine
    from edgemoe.plan.plan import Plan

Outcome = tuple[int, Completion | RequestError]
"""The number of a request and its reply, or why it has none."""

NOT_BEGUN = Completion(
    text="",
    token_ids=(),
    finish_reason="cancelled",
    logprobs=None,
    timings=Timings(
        prompt_tokens=0,
        shared_tokens=0,
        generated_tokens=0,
        wait_seconds=0.0,
        prompt_seconds=0.0,
        generate_seconds=0.0,
        time_to_first_token=0.0,
        bytes_loaded=0,
        hits=0,
        misses=0,
        cycles=0,
        drafted=0,
        accepted=0,
    ),
    prompt_token_ids=(),
)
"""The reply to a request that was cancelled before an engine had seen it."""


class NumberedRequest(NamedTuple):
    """A request and its place in the whole input."""

    number: int
    prompt: Prompt
    sampling: Sampling


class Loaded(NamedTuple):
    """What there is to know about an engine that has been loaded."""

    plan: Plan
    stats: Stats
    has_tokenizer: bool
    has_chat_template: bool


class Exchanged(NamedTuple):
    """What has finished since the last exchange, and the engine's totals."""

    outcomes: list[Outcome]
    stats: Stats


class _Shard:
    """Requests that came together. The engine reads them one by one, until `stop`."""

    def __init__(self, requests: Sequence[NumberedRequest]) -> None:
        self._requests = requests
        self._read = 0
        self._stopped = False

    def read(self) -> Iterator[tuple[Prompt, Sampling]]:
        while self._read < len(self._requests) and not self._stopped:
            request = self._requests[self._read]
            self._read += 1
            yield request.prompt, request.sampling

    def number(self, position: int) -> int:
        return self._requests[position].number

    def stop(self) -> None:
        self._stopped = True

    def unread(self) -> list[int]:
        return [request.number for request in self._requests[self._read :]]


class _Mailbox:
    """The shards of one batch that are under way, and its outcomes that have not been fetched. Thread-safe."""

    def __init__(self) -> None:
        self.ended = False
        """Whether nobody will fetch any more."""
        self.shards: set[_Shard] = set()
        self._outcomes: list[Outcome] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, outcome: Outcome) -> None:
        with self._changed:
            self._outcomes.append(outcome)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def fetch(self, patience: float) -> list[Outcome]:
        """The outcomes that there are, after at most `patience` seconds without one. Raises what ended a shard."""
        with self._changed:
            self._changed.wait_for(lambda: self._outcomes or self._error is not None, patience)
            outcomes, self._outcomes = self._outcomes, []
            if not outcomes and self._error is not None:
                raise self._error
            return outcomes


class EngineActor:
    """An engine that is asked from another process. Several calls may run at once, in threads."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._progress: Progress | None = None
        self._lock = threading.Lock()
        self._boxes: dict[int, _Mailbox] = {}
        self._ended: set[int] = set()

    def version(self) -> str:
        """The version of edgemoe that runs here."""
        return __version__

    def plan(self, factory: type[Engine] | None, model: str | None, settings: Mapping[str, Any]) -> Plan:
        """What `Engine.plan_for` says here. Raises as it does."""
        return _engine_class(factory).plan_for(model, **settings)

    def load(self, factory: type[Engine] | None, model: str | None, settings: Mapping[str, Any]) -> Loaded:
        """Loads the engine; `factory` stands in for the class `Engine`. Raises as `Engine.load` does."""
        engine = _engine_class(factory).load(model, **settings, on_progress=self._note)
        self._engine = engine
        return Loaded(engine.plan, engine.stats, engine.has_tokenizer, engine.has_chat_template)

    def progress(self) -> Progress | None:
        """How far `load` is."""
        return self._progress

    def exchange(
        self, box: int, requests: Sequence[NumberedRequest], cancel_running: bool | None, patience: float
    ) -> Exchanged:
        """Takes in requests of the batch `box` and gives out what has finished of it, waiting up to `patience` seconds.

        `cancel_running`, where it is not None, first cancels what came before, as `Engine.cancel(running=...)`.
        Raises what the engine raised, once all that had finished before has been fetched.
        """
        engine = self._loaded()
        with self._lock:
            if box in self._ended:
                return Exchanged([], engine.stats)
            mailbox = self._boxes.setdefault(box, _Mailbox())
            if cancel_running is not None:
                self._cancel(mailbox, running=cancel_running)
            if requests:
                self._begin(mailbox, _Shard(requests))
        return Exchanged(mailbox.fetch(patience), engine.stats)

    def end(self, box: int) -> None:
        """Ends what is under way of the batch `box`; whatever comes for it later is left undone."""
        with self._lock:
            self._ended.add(box)
            mailbox = self._boxes.pop(box, None)
            if mailbox is None:
                return
            mailbox.ended = True
            for shard in mailbox.shards:
                shard.stop()
            # A cancel would end other batches too. Beside them, a shard ends with its next outcome.
            if mailbox.shards and not any(other.shards for other in self._boxes.values()):
                self._loaded().cancel()

    def _cancel(self, mailbox: _Mailbox, *, running: bool) -> None:
        for shard in mailbox.shards:
            shard.stop()
        self._loaded().cancel(running=running)

    def _begin(self, mailbox: _Mailbox, shard: _Shard) -> None:
        mailbox.shards.add(shard)
        threading.Thread(target=self._serve, args=(mailbox, shard), name="edgemoe-shard", daemon=True).start()

    def _serve(self, mailbox: _Mailbox, shard: _Shard) -> None:
        """Puts the outcomes of a shard into its mailbox. What the engine has not read by the end was cancelled."""
        try:
            with closing(self._loaded().generate_batch(shard.read())) as outcomes:
                for position, outcome in outcomes:
                    if mailbox.ended:
                        return
                    mailbox.put((shard.number(position), outcome))
            for number in shard.unread():
                mailbox.put((number, NOT_BEGUN))
        except BaseException as error:
            mailbox.fail(error)
        finally:
            with self._lock:
                mailbox.shards.discard(shard)

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise EdgeMoEError("the engine has not been loaded")
        return self._engine

    def _note(self, progress: Progress) -> None:
        self._progress = progress


def _engine_class(factory: type[Engine] | None) -> type[Engine]:
    if factory is None:
        from edgemoe.engine import Engine

        return Engine
    return factory
