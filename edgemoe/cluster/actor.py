"""The actor on a node of a cluster: one engine, and a mailbox for each batch of requests sent to it.

It knows neither Ray nor the other nodes.
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

NumberedReply = tuple[int, Completion | RequestError]
"""The number of a request, and its reply or the error that refused it."""

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
"""The reply to a request that was cancelled before an engine read it."""


class NumberedRequest(NamedTuple):
    """A request, and its position in the whole input."""

    number: int
    prompt: Prompt
    sampling: Sampling


class Loaded(NamedTuple):
    """The properties of a loaded engine."""

    plan: Plan
    stats: Stats
    has_tokenizer: bool
    has_chat_template: bool


class Exchanged(NamedTuple):
    """The replies since the last exchange, and the engine's totals."""

    replies: list[NumberedReply]
    stats: Stats


class _Shard:
    """Requests of one exchange, which the engine reads one by one until `stop`."""

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
    """The running shards of one batch, and its replies that were not fetched yet. Thread-safe."""

    def __init__(self) -> None:
        self.ended = False
        """Whether the batch has ended, so that nobody fetches its replies."""
        self.shards: set[_Shard] = set()
        self._replies: list[NumberedReply] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, reply: NumberedReply) -> None:
        with self._changed:
            self._replies.append(reply)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def fetch(self, patience: float) -> list[NumberedReply]:
        """Replies so far, after up to `patience` seconds without one. Without any, raises a failed shard's error."""
        with self._changed:
            self._changed.wait_for(lambda: self._replies or self._error is not None, patience)
            replies, self._replies = self._replies, []
            if not replies and self._error is not None:
                raise self._error
            return replies


class EngineActor:
    """An engine that another process calls. Thread-safe: several calls may run at once."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._progress: Progress | None = None
        self._lock = threading.Lock()
        self._boxes: dict[int, _Mailbox] = {}
        self._ended: set[int] = set()

    def version(self) -> str:
        """The version of edgemoe on this node."""
        return __version__

    def plan(self, factory: type[Engine] | None, model: str | None, settings: Mapping[str, Any]) -> Plan:
        """The result of `Engine.plan_for` on this node. Raises as that does."""
        return _engine_class(factory).plan_for(model, **settings)

    def load(self, factory: type[Engine] | None, model: str | None, settings: Mapping[str, Any]) -> Loaded:
        """Loads the engine by the class `factory`; None is `Engine`. Raises as `Engine.load` does."""
        engine = _engine_class(factory).load(model, **settings, on_progress=self._note)
        self._engine = engine
        return Loaded(engine.plan, engine.stats, engine.has_tokenizer, engine.has_chat_template)

    def progress(self) -> Progress | None:
        """The last progress of `load`; None before the first."""
        return self._progress

    def exchange(
        self, box: int, requests: Sequence[NumberedRequest], cancel_running: bool | None, patience: float
    ) -> Exchanged:
        """Adds `requests` to the batch `box`, and returns its replies after up to `patience` seconds without one.

        Unless `cancel_running` is None, the earlier requests are cancelled first, as by `Engine.cancel(running=...)`.
        Raises the engine's error once all replies before it were fetched.
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
        """Ends the batch `box`; later requests of it are ignored."""
        with self._lock:
            self._ended.add(box)
            mailbox = self._boxes.pop(box, None)
            if mailbox is None:
                return
            mailbox.ended = True
            for shard in mailbox.shards:
                shard.stop()
            # A cancel would end other batches too. While there are some, a shard ends at its next reply.
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
        """Puts the replies of a shard into its mailbox. Requests that the engine did not read were cancelled."""
        try:
            with closing(self._loaded().generate_batch(shard.read())) as replies:
                for position, reply in replies:
                    if mailbox.ended:
                        return
                    mailbox.put((shard.number(position), reply))
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
