"""Many requests on one model: who runs, what each step computes, and whose past may stay in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from edgemoe.cache import CacheCounters
from edgemoe.draft.expert_budget import ExpertBudget
from edgemoe.draft.speculation import Speculation
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache, capacity_for
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.sequential_runner import PassInput
from edgemoe.plan.kv_size import KvSize
from edgemoe.request.request import Request
from edgemoe.scheduler.batch_size import BatchSize
from edgemoe.scheduler.prefix_cache import PrefixCache, PrefixMatch
from edgemoe.scheduler.token_budget import ScheduledTokens, select
from edgemoe.scheduler.waiting_queue import WaitingQueue

WORTH_SHARING = 8
"""Tokens; a shared beginning shorter than this is sooner computed than looked after."""
WORTH_WAITING = 128
"""Tokens of another request's prompt that are worth waiting for; a shorter beginning is sooner computed twice.

A step's cost is in the experts that it loads more than in its tokens, so that starting later costs a step.
"""
MAX_CACHED_PREFIXES = 8
"""Pasts of finished requests that stay while there is room: the turns of a conversation, a file's common header."""


@dataclass
class SchedulerTotals:
    """What a batch has done since it was made."""

    steps: int = 0
    preemptions: int = 0
    tokens_prompt: int = 0
    """Prompt tokens of the requests that have begun."""
    tokens_shared: int = 0
    """Those of them that were taken over from another request's past."""
    tokens_generated: int = 0
    seconds: float = 0.0
    """Time spent in steps."""


class Scheduler:
    """The requests in flight. They join and leave between steps. Used by one thread at a time.

    - The pasts of running and kept sequences never take more than `room_nbytes`, which holds at least
      one of the longest sequence.
    - A sequence for which there is no room any more loses its past and its place, the youngest first. It
      is computed again from its tokens, before anybody else is let in.
    - `step_tokens` bounds the tokens of a step. Decoding goes first; what is left is shared equally by
      the prompts under way, so that a long one holds nobody up, and then by drafts. Of both the first quarter
      is never taken away by what goes before.
    - No step verifies more than `max_drafted` tokens, of which each takes a row of logits.
    """

    def __init__(
        self,
        runner: ModelRunner,
        speculation: Speculation,
        kv: KvSize,
        room_nbytes: int,
        step_tokens: int,
        size: BatchSize,
        patience: int,
        budget: ExpertBudget | None = None,
        max_drafted: int | None = None,
    ) -> None:
        self.totals = SchedulerTotals()
        self.speculation = speculation
        self.budget = budget
        self.size = size
        self.runner = runner
        self._kv = kv
        self._room_nbytes = room_nbytes
        self._step_tokens = step_tokens
        self._max_drafted = step_tokens if max_drafted is None else max_drafted
        self._waiting = WaitingQueue(patience)
        self._running: list[Request] = []
        self._prefixes = PrefixCache(MAX_CACHED_PREFIXES)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet, or no more."""
        return len(self._waiting)

    @property
    def nbytes(self) -> int:
        """What all pasts are charged with; at most the room."""
        return sum(each.nbytes for each in self._running) + self._prefixes.nbytes

    def add(self, request: Request) -> None:
        """Puts a request in the waiting line."""
        self._waiting.add(request)

    def close(self) -> None:
        """Gives all pasts back, whoever still holds a request."""
        for request in list(self._running):
            self._leave(request)
            request.release_cache()
        while self._prefixes.drop_oldest():
            pass
        # They hold the model. What is counted may still be read, by a thread that did not see the end coming.
        del self.runner
        self.speculation.close()

    def step(self, counters: CacheCounters) -> None:
        """Lets in whom there is room for and computes one pass; `counters` are the cache's, for each one's share.

        When the pass fails, every request that was part of it is told the error; the rest goes on. Raised is
        only what ends the thread that computes, such as a KeyboardInterrupt.
        """
        self._drop_cancelled()
        self._admit()
        scheduled = self._make_room(select(self._running, self._step_tokens, self.runner.sequential.can_chunk))
        if not scheduled:
            return
        started, generated = time.perf_counter(), self.totals.tokens_generated
        # What a draft prefetches is part of the step that it is for.
        before = counters.copy()
        try:
            self._compute(scheduled, self._draft(scheduled), before, counters)
        except BaseException as error:
            for request, _ in scheduled:
                request.fail(error)
            self.speculation.end_cycle()
            if not isinstance(error, Exception):
                raise
        else:
            seconds = time.perf_counter() - started
            self.totals.steps += 1
            self.totals.seconds += seconds
            self.size.observe(len(scheduled), self.totals.tokens_generated - generated, seconds)
        finally:
            self._let_go()

    # --- who runs ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives places to those whose turn it is, while there are places and room."""
        while len(self._waiting) and len(self._running) < self.size.limit:
            request = self._waiting.first()
            match = self._match(request)
            if self._shared_soon(request, match.tokens if match else 0):
                return
            capacity = capacity_for(len(request.tokens), request.max_length)
            # Kept pasts are not counted: they go before anybody has to wait.
            taken = sum(each.nbytes for each in self._running)
            if self._running and taken + self._kv.nbytes(capacity) > self._room_nbytes:
                self.size.held_back(len(self._running))
                return
            self._waiting.take_first()
            try:
                self._begin(request, match, capacity)
            except BaseException as error:
                # It is in no line any more, so that only this can tell it.
                request.fail(error)
                self.speculation.forget(request)
                self._let_go()
                if not isinstance(error, Exception):
                    raise

    def _match(self, request: Request) -> PrefixMatch | None:
        """The past to begin with, where there is one that is worth it."""
        match = self._prefixes.best(request.key)
        if match is None or match.tokens < WORTH_SHARING or not self.runner.sequential.can_chunk(request.tokens):
            return None
        return match

    def _shared_soon(self, request: Request, ready: int) -> bool:
        """Whether a running request is about to compute much of this one's beginning, `ready` tokens being there."""
        coming = self._prefixes.coming(request.key)
        if coming is None:
            return False
        number, shared = coming
        shared = min(shared, request.prompt_length - 1)
        other = next(each for each in self._running if each.number == number)
        assert other.cache is not None
        if shared - ready < WORTH_WAITING or not ready <= other.cache.tokens < shared:
            return False
        if not self.runner.sequential.can_chunk(other.tokens):
            return False
        if not other.cache.can_always_crop():
            other.pause_at = shared
        return True

    def _begin(self, request: Request, match: PrefixMatch | None, capacity: int) -> None:
        """Gives `request` its place and its past."""
        if match is not None and match.kept is not None:
            # What goes beyond the match is the rest of another conversation, unless it is next to nothing.
            if match.cache.can_crop() and match.cache.tokens - match.tokens < WORTH_SHARING:
                self._prefixes.take(match.kept)
            else:
                self._prefixes.touch(match.kept)
        self._free(self._kv.nbytes(capacity))
        cache = self._first_cache(match, capacity)
        if not request.begun:
            self.totals.tokens_prompt += request.prompt_length
            self.totals.tokens_shared += cache.tokens
        request.begin(cache, self._kv.nbytes(cache.capacity))
        self._running.append(request)
        self._prefixes.watch(request.key, request.number, cache)
        alone = len(self._running) == 1 and not len(self._waiting) and request.prompt_length > WORTH_SHARING
        if alone and not cache.can_always_crop() and self.runner.sequential.can_chunk(request.tokens):
            # Asked again (/regen), such a past could not be cut back to the prompt: a copy is kept on the way.
            request.pause_at = request.prompt_length - 1

    def _first_cache(self, match: PrefixMatch | None, capacity: int) -> SequenceCache:
        if match is None:
            return self.runner.sequential.start(capacity)
        if match.kept is None or self._prefixes.owns(match.kept):
            return match.cache.fork(match.tokens, capacity)
        if match.tokens < match.cache.tokens:
            match.cache.crop(match.tokens)
        match.cache.reserve(capacity)
        return match.cache

    def _preempt(self, request: Request) -> None:
        """Takes past and place away; it is the first to get them back."""
        self._leave(request)
        request.release_cache()
        self._waiting.put_back(request)
        self.totals.preemptions += 1

    def _drop_cancelled(self) -> None:
        waiting = {request for request in self._waiting if request.cancelled}
        self._waiting.remove_if(waiting)
        for request in [*waiting, *(each for each in self._running if each.cancelled)]:
            request.cancel()
            if request in waiting:
                self.speculation.forget(request)
        self._let_go()

    def _let_go(self) -> None:
        """Ends the places of those that have finished, and keeps their pasts for who comes next."""
        for request in [each for each in self._running if each.finished]:
            self._leave(request)
            nbytes = request.nbytes
            cache = request.release_cache()
            if request.error is None and cache.tokens >= WORTH_SHARING:
                self._keep_cache(request, cache, nbytes)

    def _keep_cache(self, request: Request, cache: SequenceCache, nbytes: int) -> None:
        """Keeps what another request may begin with; of a reply that is not exact, for a budget, the prompt alone."""
        if self.budget is not None and request.cycles:
            if request.prompt_length < WORTH_SHARING or not cache.can_crop():
                return
            cache.crop(request.prompt_length)
        cache.trim()
        self._prefixes.keep(request.tokens[: cache.tokens], cache, nbytes)

    def _leave(self, request: Request) -> None:
        self._running.remove(request)
        self.speculation.forget(request)
        self._prefixes.unwatch(request.key, request.number)

    # --- what a step computes ----------------------------------------------------------------------

    def _draft(self, scheduled: Sequence[ScheduledTokens]) -> Mapping[Request, DraftTree]:
        """What may follow those that decode, as far as there is room for it."""
        decoding = [request for request, count in scheduled if count == 1 == request.missing]
        if not any(each.generated for each in decoding) or not self.speculation.active:
            return {}
        # However much of the step is taken, drafts get on, as newcomers do.
        left = max(self._step_tokens - sum(count for _, count in scheduled), self._step_tokens // 4)
        most = min(left, self._max_drafted) // len(decoding)
        rooms = {each: min(most, self._room_to_draft(each)) for each in decoding if each.generated}
        return self.speculation.grow(rooms, mixed=len(rooms) < len(scheduled))

    def _compute(
        self,
        scheduled: Sequence[ScheduledTokens],
        trees: Mapping[Request, DraftTree],
        before: CacheCounters,
        counters: CacheCounters,
    ) -> None:
        """Runs the pass and hands its logits to those whose tokens are all computed."""
        work, bases = [], {}
        for request, count in scheduled:
            cache, tree = request.cache, trees.get(request)
            assert cache is not None
            if tree is None:
                work.append(PassInput(cache, request.tokens[cache.tokens : cache.tokens + count]))
            else:
                bases[request] = cache.tokens
                cache.mark()
                work.append(tree_input(cache, tree, range(len(tree)), ())._replace(verifies=True))
        started = time.perf_counter()
        with self._budgeted(scheduled, work, trees):
            results = self.runner.run(work)
        waited = counters.link_wait_seconds - before.link_wait_seconds
        # Before the chunks are made, which say what has been moved for them.
        self._account(scheduled, work, before, counters)
        for (request, _), logits in zip(scheduled, results, strict=True):
            if request.cache is not None and request.cache.tokens == request.pause_at:
                self._keep_copy(request)
            if request in trees:
                self._verify(request, trees[request], logits, bases[request])
            elif request.missing == 0:
                request.advance(logits)
                self.totals.tokens_generated += 1
        self.speculation.stepped(work, bool(trees), time.perf_counter() - started, waited)

    def _budgeted(
        self, scheduled: Sequence[ScheduledTokens], work: Sequence[PassInput], trees: Mapping[Request, DraftTree]
    ) -> AbstractContextManager[None]:
        """The block in which a pass runs: under the budget of those that verify, where there is one."""
        if self.budget is None:
            return nullcontext()
        drafted = [trees.get(request) for request, _ in scheduled]
        return self.budget.restricting(work, [tree.probabilities if tree else None for tree in drafted])

    def _verify(self, request: Request, tree: DraftTree, logits: torch.Tensor, base: int) -> None:
        """Adds what the pass says of `tree` to the reply, and keeps of its keys and values what belongs to it."""
        assert request.cache is not None
        before = request.generated
        path = request.verify(tree, logits)
        made = request.generated - before
        request.cache.rollback(base, path[:made])
        self.speculation.learn(request, tree, path, made)
        self.totals.tokens_generated += made

    def _room_to_draft(self, request: Request) -> int:
        """Nodes that its past may take beside the last token, without anybody else's past having to go."""
        cache = request.cache
        assert cache is not None
        left = request.max_length - cache.tokens - 2
        turn = self.runner.max_depth(cache.tokens)
        left = left if turn is None else min(left, turn)
        wanted = cache.tokens + 1 + min(self.speculation.max_nodes, left)
        if wanted > cache.capacity:
            capacity = capacity_for(wanted, request.max_length)
            nbytes = self._kv.nbytes(capacity)
            if self.nbytes + nbytes - request.nbytes <= self._room_nbytes:
                cache.reserve(capacity)
                request.nbytes = nbytes
        return max(0, min(left, cache.capacity - cache.tokens - 1))

    @staticmethod
    def _account(
        scheduled: Sequence[ScheduledTokens], work: Sequence[PassInput], before: CacheCounters, after: CacheCounters
    ) -> None:
        """Divides what the step asked for and moved by the tokens that each had in it, drafted ones included."""
        total = sum(len(item.tokens) for item in work)
        hits, misses = after.hits - before.hits, after.misses - before.misses
        nbytes = after.bytes_loaded - before.bytes_loaded
        for (request, _), item in zip(scheduled, work, strict=True):
            part = len(item.tokens) / total
            request.account(hits * part, misses * part, nbytes * part)

    # --- room --------------------------------------------------------------------------------------

    def _make_room(self, scheduled: Sequence[ScheduledTokens]) -> list[ScheduledTokens]:
        """Lets pasts grow for the step, the oldest first, and leaves out those that had to go for it."""
        order = {request: place for place, request in enumerate(self._running)}
        for request, count in sorted(scheduled, key=lambda each_share: order[each_share.request]):
            cache = request.cache
            if cache is None or cache.tokens + count <= cache.capacity:
                continue
            capacity = capacity_for(cache.tokens + count, request.max_length)
            nbytes = self._kv.nbytes(capacity)
            while not self._free(nbytes - request.nbytes) and self._running[-1] is not request:
                self._preempt(self._running[-1])
            if not self._free(nbytes - request.nbytes) and len(self._running) > 1:
                self._preempt(request)
                continue
            cache.reserve(capacity)
            request.nbytes = nbytes
        return [each_share for each_share in scheduled if each_share.request.cache is not None]

    def _free(self, nbytes: int) -> bool:
        """Drops kept pasts until there is room for `nbytes` more; whether there is."""
        while self.nbytes + nbytes > self._room_nbytes:
            if not self._prefixes.drop_oldest():
                return False
        return True

    def _keep_copy(self, request: Request) -> None:
        """Keeps a copy of a past that others will begin with, where there is room for it."""
        cache, request.pause_at = request.cache, None
        assert cache is not None
        nbytes = self._kv.nbytes(cache.tokens)
        if self._free(nbytes):
            self._prefixes.keep(request.tokens[: cache.tokens], cache.fork(cache.tokens, cache.tokens), nbytes)
