"""Decides which requests run, what each step runs, and whose KV cache stays in memory.

`schedule` gives a step as a value, `commit` takes what its pass returned. Nothing here runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgemoe.draft.proposal import Verified
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import STATES_BESIDE_NODES, SequenceCache
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.pass_logits import LogitsRows
from edgemoe.request.request import Request
from edgemoe.scheduler.batch_size import BatchSize
from edgemoe.scheduler.kv_budget import KvBudget
from edgemoe.scheduler.memory_relief import MemoryRelief
from edgemoe.scheduler.prefix_cache import PrefixCache, PrefixMatch
from edgemoe.scheduler.step import Committed, ScheduledStep, ScheduledTokens, StepOutputs
from edgemoe.scheduler.token_budget import select
from edgemoe.scheduler.waiting_queue import WaitingQueue

MIN_PREFIX = 8
"""Tokens; a shorter common prefix costs less to compute than to look after."""
MIN_AWAITED_PREFIX = 128
"""Tokens of another request's prompt that are worth waiting for.

A step's cost depends on the experts that it loads more than on its tokens, so starting later costs a step.
"""
MAX_CACHED_PREFIXES = 8
"""KV caches of finished requests that stay while they fit: turns of a conversation, a common header of a file."""


@dataclass
class SchedulerTotals:
    """What an engine's requests have been given since it was loaded."""

    requests: int = 0
    steps: int = 0
    preemptions: int = 0
    tokens_prompt: int = 0
    """Prompt tokens of the requests that have begun."""
    tokens_shared: int = 0
    """Prompt tokens that were taken from another request's KV cache."""
    tokens_generated: int = 0
    seconds: float = 0.0
    """Time spent in steps."""


class Scheduler:
    """The requests of an engine, waiting and running. They join and leave between steps. Used by one thread at a time.

    - A running request owns its KV cache. When it ends, the cache goes to the prefix cache or is freed.
    - A running request whose cache cannot grow is preempted, the youngest first: its cache is freed, and it is the
      first to run again, from its tokens.
    - `step_tokens` bounds the tokens of a step. Decoding goes first; prompts share the rest equally, then come drafts.
      Prompts and drafts each get a quarter of the step in any case.
    - No step verifies more than `max_drafted` tokens, each of which takes a row of logits.
    """

    def __init__(
        self,
        runner: ModelRunner,
        kv: KvBudget,
        step_tokens: int,
        size: BatchSize,
        patience: int,
        *,
        max_draft_nodes: int = 0,
        max_drafted: int | None = None,
        max_states: int | None = None,
    ) -> None:
        """`max_draft_nodes` bounds the draft of one request; 0 where nothing drafts.

        `max_states` is how many states of a sequence a step may keep for drafted tokens; None where it keeps none.
        """
        self.totals = SchedulerTotals()
        self.size = size
        self.kv = kv
        self._runner = runner
        self._relief = MemoryRelief(size, step_tokens)
        self._max_draft_nodes = max_draft_nodes
        self._max_drafted = step_tokens if max_drafted is None else max_drafted
        self._max_states = max_states
        self._waiting = WaitingQueue(patience)
        self._running: list[Request] = []
        self._prefixes = PrefixCache(kv, MAX_CACHED_PREFIXES)
        self._pauses: dict[Request, int] = {}
        self._departed: list[Request] = []

    @property
    def running(self) -> int:
        """Number of requests that run."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of requests that wait to run, for the first time or again."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Puts a request in the waiting queue."""
        self._waiting.add(request)
        self.totals.requests += 1

    def cancel(self, ends: Callable[[Request], bool]) -> None:
        """Ends the requests for which `ends`, with the reply so far. May be called while a step runs.

        Those of the batch leave it at the next `release`: a pass may still write to their KV caches.
        """
        waiting = {request for request in self._waiting if ends(request)}
        self._waiting.remove_if(waiting)
        for request in [*waiting, *(each for each in self._running if ends(each))]:
            request.cancel()
        self._departed += waiting

    def schedule(self) -> ScheduledStep:
        """The next step: admits waiting requests, and reserves KV cache for what will run."""
        self.release()
        self._admit()
        parts = self._with_capacity(
            select(self._running, self._relief.step_tokens, self._runner.can_chunk, self._pauses)
        )
        return ScheduledStep(parts, self._draft_limits(parts))

    def commit(self, step: ScheduledStep, drafts: Mapping[Request, DraftTree], outputs: StepOutputs) -> Committed:
        """Gives every request of `step` what its pass returned: tokens, and the cached tokens of its draft's path.

        `drafts` are the trees that the pass verified.
        """
        verified, generated = {}, 0
        self._relief.went_well()
        self._account(step.parts, outputs)
        for (request, _), rows in zip(step.parts, outputs.logits, strict=True):
            if request.cache is not None and request.cache.tokens == self._pauses.get(request):
                self._keep_copy(request, request.cache)
            if request.finished:
                # Cancelled while the pass ran.
                if request in drafts and request.cache is not None:
                    request.cache.rollback(outputs.bases[request])
            elif request in drafts:
                found = _verify(request, drafts[request], rows, outputs.bases[request])
                request.lossy |= outputs.lossy
                if request.error is None:
                    verified[request] = found
                    generated += found.tokens
            elif request.uncomputed == 0:
                request.advance(rows[-1])
                generated += request.error is None
        self.totals.tokens_generated += generated
        return Committed(generated, verified)

    def fail(self, step: ScheduledStep, error: BaseException) -> None:
        """Ends every request of `step` with `error`; one that was cancelled meanwhile ends as in `abort`."""
        for request, _ in step.parts:
            request.fail(error)
            if request.error is None:
                self._take_back(request)

    def relieve(self, step: ScheduledStep) -> bool:
        """Has `step`, whose pass found no memory, begin again with more; False where that was tried often enough."""
        if not self._relief.tighten():
            return False
        self._prefixes.clear()
        in_step = {request for request, _ in step.parts}
        for request in [each for each in reversed(self._running) if each in in_step]:
            # Its KV cache is half written, and takes memory.
            (self._take_back if request.finished else self._preempt)(request)
        return True

    def fail_all(self, error: BaseException) -> None:
        """Ends every request with `error`."""
        waiting = set(self._waiting)
        self._waiting.remove_if(waiting)
        self._departed += waiting
        for request in [*waiting, *self._running]:
            request.fail(error)

    def abort(self, step: ScheduledStep) -> None:
        """Ends every request of `step`, whose pass was left between two layers, with the reply so far.

        KV caches that can be taken back to the step before stay, for prompts that begin alike.
        """
        for request, _ in step.parts:
            request.cancel()
            self._take_back(request)

    def release(self) -> None:
        """Takes finished requests out of the batch and keeps their KV caches for those that come next."""
        for request in [each for each in self._running if each.finished]:
            self._leave(request)
            cache = request.release_cache()
            if request.error is None and _crop_to_exact(request, cache) and cache.tokens >= MIN_PREFIX:
                self._prefixes.keep_trimmed(request.tokens[: cache.tokens], cache)
            else:
                self.kv.release(cache)

    def departed(self) -> list[Request]:
        """The requests that have left the batch since the last call: finished, or preempted."""
        departed, self._departed = self._departed, []
        return departed

    def close(self) -> None:
        """Frees all KV caches. The requests that were running end without one."""
        for request in list(self._running):
            self._leave(request)
            self.kv.release(request.release_cache())
        self._prefixes.clear()
        # It holds the model. Totals may still be read by a thread that did not see the end coming.
        del self._runner

    # --- who runs ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Starts waiting requests in turn, while the batch and the KV budget have room for them."""
        while len(self._waiting) and len(self._running) < self.size.limit:
            request = self._waiting.first()
            match = self._match(request)
            if self._prefix_is_coming(request, match.tokens if match else 0):
                return
            capacity = self.kv.capacity_for(len(request.tokens), request.max_length)
            # Cached prefixes are not counted: they are evicted before a request has to wait.
            taken = sum(self.kv.charged(each.cache) for each in self._running if each.cache is not None)
            if self._running and taken + self.kv.nbytes_for(capacity) > self.kv.limit_nbytes:
                self.size.held_back(len(self._running))
                return
            self._waiting.take_first()
            try:
                self._start(request, match, capacity)
            except BaseException as error:
                # No queue holds it any more, so nothing else could tell it.
                request.fail(error)
                self._departed.append(request)
                self.release()
                if not isinstance(error, Exception):
                    raise

    def _match(self, request: Request) -> PrefixMatch | None:
        """The KV cache to start with, where one is worth it."""
        match = self._prefixes.best(request.key)
        return match if match is not None and match.tokens >= MIN_PREFIX and self._runner.can_chunk else None

    def _prefix_is_coming(self, request: Request, ready: int) -> bool:
        """Whether a running request will soon have computed much more of the prompt than the `ready` tokens."""
        coming = self._prefixes.coming(request.key)
        if coming is None or not self._runner.can_chunk:
            return False
        number, shared = coming
        shared = min(shared, request.prompt_length - 1)
        other = next(each for each in self._running if each.number == number)
        assert other.cache is not None
        if shared - ready < MIN_AWAITED_PREFIX or not ready <= other.cache.tokens < shared:
            return False
        if not other.cache.can_always_crop():
            self._pauses[other] = shared
        return True

    def _start(self, request: Request, match: PrefixMatch | None, capacity: int) -> None:
        cache = self._first_cache(match, capacity)
        self.kv.charge(cache)
        if not request.begun:
            self.totals.tokens_prompt += request.prompt_length
            self.totals.tokens_shared += cache.tokens
        request.begin(cache)
        self._running.append(request)
        self._prefixes.watch(request.key, request.number, cache)
        alone = len(self._running) == 1 and not len(self._waiting) and request.prompt_length > MIN_PREFIX
        if alone and not cache.can_always_crop() and self._runner.can_chunk:
            # Asked again (/regen), such a cache could not be cropped to the prompt: a copy is made on the way.
            self._pauses[request] = request.prompt_length - 1

    def _first_cache(self, match: PrefixMatch | None, capacity: int) -> SequenceCache:
        """An uncharged KV cache for a request that starts: empty, the matched one itself, or a copy of it."""
        prefix = match.prefix if match else None
        owned: SequenceCache | None = None
        if match is not None and prefix is not None:
            # Tokens beyond the match are another conversation's, which is worth keeping unless they are few.
            if match.cache.can_crop() and match.cache.tokens - match.tokens < MIN_PREFIX:
                owned = self._prefixes.take(prefix)
            else:
                self._prefixes.touch(prefix)
        evicted = self._prefixes.evict_for(self.kv.nbytes_for(capacity))
        if match is None:
            return self._runner.start(capacity)
        if owned is None and prefix is not None and any(each is prefix for each in evicted):
            owned = prefix.cache
        if owned is None:
            return match.cache.fork(match.tokens, capacity)
        if match.tokens < owned.tokens:
            owned.crop(match.tokens)
        owned.reserve(capacity)
        return owned

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self.kv.release(request.release_cache())
        self._waiting.put_back(request)
        self.totals.preemptions += 1

    def _take_back(self, request: Request) -> None:
        """Takes the KV cache of a request that has ended back to the step before, or frees it."""
        if request.cache is not None and not request.cache.restore():
            self._leave(request)
            self.kv.release(request.release_cache())

    def _leave(self, request: Request) -> None:
        self._running.remove(request)
        self._pauses.pop(request, None)
        self._prefixes.unwatch(request.key, request.number)
        self._departed.append(request)

    # --- KV caches ---------------------------------------------------------------------------------

    def _with_capacity(self, parts: Sequence[ScheduledTokens]) -> list[ScheduledTokens]:
        """Lets KV caches grow for the step, the oldest request first; without those that were preempted for it."""
        order = {request: place for place, request in enumerate(self._running)}
        for request, count in sorted(parts, key=lambda part: order[part.request]):
            cache = request.cache
            if cache is None or cache.tokens + count <= cache.capacity:
                continue
            capacity = self.kv.capacity_for(cache.tokens + count, request.max_length)
            more = self.kv.more_for(cache, capacity)
            while not self._evicted_for(more) and self._running[-1] is not request:
                self._preempt(self._running[-1])
            if not self._evicted_for(more) and len(self._running) > 1:
                self._preempt(request)
                continue
            self._grow(cache, capacity)
        return [part for part in parts if part.request.cache is not None]

    def _draft_limits(self, parts: Sequence[ScheduledTokens]) -> dict[Request, int]:
        """Most nodes of each decoding request's draft, within the step, the rows of logits and its KV cache."""
        decoding = [request for request, count in parts if count == 1 == request.uncomputed]
        if not self._max_draft_nodes or not any(each.generated for each in decoding):
            return {}
        left = max(self._relief.step_tokens - sum(count for _, count in parts), self._relief.step_tokens // 4)
        most = min(left, self._max_drafted) // len(decoding)
        if self._max_states is not None:
            most = max(0, min(most, self._max_states // len(decoding) - STATES_BESIDE_NODES))
        return {each: min(most, self._draft_capacity(each)) for each in decoding if each.generated}

    def _draft_capacity(self, request: Request) -> int:
        """Nodes that fit the request's KV cache beside its last token; it grows where no other cache has to go."""
        cache = request.cache
        assert cache is not None
        left = request.max_length - cache.tokens - 2
        depth = self._runner.max_depth(cache.tokens)
        left = left if depth is None else min(left, depth)
        wanted = cache.tokens + 1 + min(self._max_draft_nodes, left)
        if wanted > cache.capacity:
            capacity = self.kv.capacity_for(wanted, request.max_length)
            if self.kv.fits(self.kv.more_for(cache, capacity)):
                self._grow(cache, capacity)
        return max(0, min(left, cache.capacity - cache.tokens - 1))

    def _grow(self, cache: SequenceCache, capacity: int) -> None:
        cache.reserve(capacity)
        self.kv.charge(cache)

    def _evicted_for(self, nbytes: int) -> bool:
        """Evicts cached prefixes until `nbytes` more fit; whether they do."""
        self._prefixes.evict_for(nbytes)
        return self.kv.fits(nbytes)

    def _keep_copy(self, request: Request, cache: SequenceCache) -> None:
        """Keeps a copy of a running request's cache that others will start with, where it fits."""
        del self._pauses[request]
        if self._evicted_for(self.kv.nbytes_for(cache.tokens)):
            self._prefixes.keep_copy(request.tokens[: cache.tokens], cache)

    @staticmethod
    def _account(parts: Sequence[ScheduledTokens], outputs: StepOutputs) -> None:
        """Divides what the step requested and moved by the tokens that each request had in it, drafts included."""
        total = sum(len(item.tokens) for item in outputs.inputs)
        for (request, _), item in zip(parts, outputs.inputs, strict=True):
            share = len(item.tokens) / total
            request.account(outputs.hits * share, outputs.misses * share, outputs.nbytes_loaded * share)


def _verify(request: Request, tree: DraftTree, rows: LogitsRows, base: int) -> Verified:
    """Adds the tokens that a verification gives to the reply, and keeps the cached tokens that belong to it."""
    assert request.cache is not None
    before = request.generated
    path = request.verify(tree, rows)
    tokens = request.generated - before
    if request.error is None:
        request.cache.rollback(base, path[:tokens])
    return Verified(path, tokens)


def _crop_to_exact(request: Request, cache: SequenceCache) -> bool:
    """Takes what follows the prompt of a lossy reply from its cache; False where something does and that cannot be."""
    # One that began again has computed what it had written, which was not lossy.
    if not request.lossy or cache.tokens <= request.prompt_length:
        return True
    if cache.can_crop():
        cache.crop(request.prompt_length)
    return cache.tokens <= request.prompt_length
