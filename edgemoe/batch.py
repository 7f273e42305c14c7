"""Many requests on one model: who runs, what each step computes, and whose past may stay in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from edgemoe.batch_size import BatchSize
from edgemoe.cache import CacheCounters
from edgemoe.decoder import Work
from edgemoe.draft_tree import DraftTree
from edgemoe.expert_budget import BudgetedPasses
from edgemoe.generation import Generation
from edgemoe.joint_decoder import JointDecoder, tree_work
from edgemoe.kv_size import KvSize
from edgemoe.past import Past, room_for
from edgemoe.prefixes import Match, Prefixes
from edgemoe.shares import Share, select
from edgemoe.speculation import Speculation
from edgemoe.waiting_line import WaitingLine

WORTH_SHARING = 8
"""Tokens; a shared beginning shorter than this is sooner computed than looked after."""
WORTH_WAITING = 128
"""Tokens of another request's prompt that are worth waiting for; a shorter beginning is sooner computed twice.

A step's cost is in the experts that it loads more than in its tokens, so that starting later costs a step.
"""
KEPT_PASTS = 8
"""Pasts of finished requests that stay while there is room: the turns of a conversation, a file's common header."""


@dataclass
class BatchTotals:
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


class Batch:
    """The requests in flight. They join and leave between steps. Used by one thread at a time.

    - The pasts of running and kept sequences never take more than `room_nbytes`, which holds at least
      one of the longest sequence.
    - A sequence for which there is no room any more loses its past and its place, the youngest first. It
      is computed again from its tokens, before anybody else is let in.
    - `step_tokens` bounds the tokens of a step. Decoding goes first; what is left is shared equally by
      the prompts under way, so that a long one holds nobody up, and then by drafts. Of both the first quarter
      is never taken away by what goes before.
    - No step verifies more than `most_drafted` tokens, of which each takes a row of logits.
    """

    def __init__(
        self,
        decoder: JointDecoder,
        speculation: Speculation,
        kv: KvSize,
        room_nbytes: int,
        step_tokens: int,
        size: BatchSize,
        patience: int,
        budget: BudgetedPasses | None = None,
        most_drafted: int | None = None,
    ) -> None:
        self.totals = BatchTotals()
        self.speculation = speculation
        self.budget = budget
        self.size = size
        self.decoder = decoder
        self._kv = kv
        self._room_nbytes = room_nbytes
        self._step_tokens = step_tokens
        self._most_drafted = step_tokens if most_drafted is None else most_drafted
        self._waiting = WaitingLine(patience)
        self._running: list[Generation] = []
        self._prefixes = Prefixes(KEPT_PASTS)

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

    def add(self, generation: Generation) -> None:
        """Puts a request in the waiting line."""
        self._waiting.add(generation)

    def close(self) -> None:
        """Gives all pasts back, whoever still holds a request."""
        for generation in list(self._running):
            self._leave(generation)
            generation.give_up_past()
        while self._prefixes.drop_oldest():
            pass
        # They hold the model. What is counted may still be read, by a thread that did not see the end coming.
        del self.decoder
        self.speculation.close()

    def step(self, counters: CacheCounters) -> None:
        """Lets in whom there is room for and computes one pass; `counters` are the cache's, for each one's share.

        When the pass fails, every request that was part of it is told the error; the rest goes on. Raised is
        only what ends the thread that computes, such as a KeyboardInterrupt.
        """
        self._drop_cancelled()
        self._admit()
        shares = self._make_room(select(self._running, self._step_tokens, self.decoder.plain.can_chunk))
        if not shares:
            return
        started, generated = time.perf_counter(), self.totals.tokens_generated
        # What a draft prefetches is part of the step that it is for.
        before = counters.copy()
        try:
            self._compute(shares, self._draft(shares), before, counters)
        except BaseException as error:
            for generation, _ in shares:
                generation.fail(error)
            self.speculation.end_cycle()
            if not isinstance(error, Exception):
                raise
        else:
            seconds = time.perf_counter() - started
            self.totals.steps += 1
            self.totals.seconds += seconds
            self.size.observe(len(shares), self.totals.tokens_generated - generated, seconds)
        finally:
            self._let_go()

    # --- who runs ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives places to those whose turn it is, while there are places and room."""
        while len(self._waiting) and len(self._running) < self.size.limit:
            generation = self._waiting.first()
            match = self._match(generation)
            if self._shared_soon(generation, match.tokens if match else 0):
                return
            room = room_for(len(generation.tokens), generation.most_tokens)
            # Kept pasts are not counted: they go before anybody has to wait.
            taken = sum(each.nbytes for each in self._running)
            if self._running and taken + self._kv.nbytes(room) > self._room_nbytes:
                self.size.held_back(len(self._running))
                return
            self._waiting.take_first()
            try:
                self._begin(generation, match, room)
            except BaseException as error:
                # It is in no line any more, so that only this can tell it.
                generation.fail(error)
                self.speculation.forget(generation)
                self._let_go()
                if not isinstance(error, Exception):
                    raise

    def _match(self, generation: Generation) -> Match | None:
        """The past to begin with, where there is one that is worth it."""
        match = self._prefixes.best(generation.key)
        if match is None or match.tokens < WORTH_SHARING or not self.decoder.plain.can_chunk(generation.tokens):
            return None
        return match

    def _shared_soon(self, generation: Generation, ready: int) -> bool:
        """Whether a running request is about to compute much of this one's beginning, `ready` tokens being there."""
        coming = self._prefixes.coming(generation.key)
        if coming is None:
            return False
        number, shared = coming
        shared = min(shared, generation.prompt_length - 1)
        other = next(each for each in self._running if each.number == number)
        assert other.past is not None
        if shared - ready < WORTH_WAITING or not ready <= other.past.tokens < shared:
            return False
        if not self.decoder.plain.can_chunk(other.tokens):
            return False
        if not other.past.can_always_cut():
            other.pause_at = shared
        return True

    def _begin(self, generation: Generation, match: Match | None, room: int) -> None:
        """Gives `generation` its place and its past."""
        if match is not None and match.kept is not None:
            # What goes beyond the match is the rest of another conversation, unless it is next to nothing.
            if match.past.can_cut() and match.past.tokens - match.tokens < WORTH_SHARING:
                self._prefixes.take(match.kept)
            else:
                self._prefixes.touch(match.kept)
        self._free(self._kv.nbytes(room))
        past = self._first_past(match, room)
        if not generation.begun:
            self.totals.tokens_prompt += generation.prompt_length
            self.totals.tokens_shared += past.tokens
        generation.begin(past, self._kv.nbytes(past.room))
        self._running.append(generation)
        self._prefixes.watch(generation.key, generation.number, past)
        alone = len(self._running) == 1 and not len(self._waiting) and generation.prompt_length > WORTH_SHARING
        if alone and not past.can_always_cut() and self.decoder.plain.can_chunk(generation.tokens):
            # Asked again (/regen), such a past could not be cut back to the prompt: a copy is kept on the way.
            generation.pause_at = generation.prompt_length - 1

    def _first_past(self, match: Match | None, room: int) -> Past:
        if match is None:
            return self.decoder.plain.start(room)
        if match.kept is None or self._prefixes.owns(match.kept):
            return match.past.fork(match.tokens, room)
        if match.tokens < match.past.tokens:
            match.past.cut(match.tokens)
        match.past.make_room(room)
        return match.past

    def _preempt(self, generation: Generation) -> None:
        """Takes past and place away; it is the first to get them back."""
        self._leave(generation)
        generation.give_up_past()
        self._waiting.put_back(generation)
        self.totals.preemptions += 1

    def _drop_cancelled(self) -> None:
        waiting = {generation for generation in self._waiting if generation.cancelled}
        self._waiting.remove_if(waiting)
        for generation in [*waiting, *(each for each in self._running if each.cancelled)]:
            generation.cancel()
            if generation in waiting:
                self.speculation.forget(generation)
        self._let_go()

    def _let_go(self) -> None:
        """Ends the places of those that have finished, and keeps their pasts for who comes next."""
        for generation in [each for each in self._running if each.finished]:
            self._leave(generation)
            nbytes = generation.nbytes
            past = generation.give_up_past()
            if generation.error is None and past.tokens >= WORTH_SHARING:
                self._keep_past(generation, past, nbytes)

    def _keep_past(self, generation: Generation, past: Past, nbytes: int) -> None:
        """Keeps what another request may begin with; of a reply that is not exact, for a budget, the prompt alone."""
        if self.budget is not None and generation.cycles:
            if generation.prompt_length < WORTH_SHARING or not past.can_cut():
                return
            past.cut(generation.prompt_length)
        past.trim()
        self._prefixes.keep(generation.tokens[: past.tokens], past, nbytes)

    def _leave(self, generation: Generation) -> None:
        self._running.remove(generation)
        self.speculation.forget(generation)
        self._prefixes.unwatch(generation.key, generation.number)

    # --- what a step computes ----------------------------------------------------------------------

    def _draft(self, shares: Sequence[Share]) -> Mapping[Generation, DraftTree]:
        """What may follow those that decode, as far as there is room for it."""
        decoding = [generation for generation, count in shares if count == 1 == generation.missing]
        if not any(each.generated for each in decoding) or not self.speculation.active:
            return {}
        # However much of the step is taken, drafts get on, as newcomers do.
        left = max(self._step_tokens - sum(count for _, count in shares), self._step_tokens // 4)
        most = min(left, self._most_drafted) // len(decoding)
        rooms = {each: min(most, self._room_to_draft(each)) for each in decoding if each.generated}
        return self.speculation.grow(rooms, mixed=len(rooms) < len(shares))

    def _compute(
        self,
        shares: Sequence[Share],
        trees: Mapping[Generation, DraftTree],
        before: CacheCounters,
        counters: CacheCounters,
    ) -> None:
        """Runs the pass and hands its logits to those whose tokens are all computed."""
        work, bases = [], {}
        for generation, count in shares:
            past, tree = generation.past, trees.get(generation)
            assert past is not None
            if tree is None:
                work.append(Work(past, generation.tokens[past.tokens : past.tokens + count]))
            else:
                bases[generation] = past.tokens
                past.draft()
                work.append(tree_work(past, tree, range(len(tree)), ())._replace(verifies=True))
        started = time.perf_counter()
        with self._budgeted(shares, work, trees):
            results = self.decoder.run(work)
        waited = counters.link_wait_seconds - before.link_wait_seconds
        # Before the chunks are made, which say what has been moved for them.
        self._account(shares, work, before, counters)
        for (generation, _), logits in zip(shares, results, strict=True):
            if generation.past is not None and generation.past.tokens == generation.pause_at:
                self._keep_copy(generation)
            if generation in trees:
                self._verify(generation, trees[generation], logits, bases[generation])
            elif generation.missing == 0:
                generation.advance(logits)
                self.totals.tokens_generated += 1
        self.speculation.stepped(work, bool(trees), time.perf_counter() - started, waited)

    def _budgeted(
        self, shares: Sequence[Share], work: Sequence[Work], trees: Mapping[Generation, DraftTree]
    ) -> AbstractContextManager[None]:
        """The block in which a pass runs: under the budget of those that verify, where there is one."""
        if self.budget is None:
            return nullcontext()
        drafted = [trees.get(generation) for generation, _ in shares]
        return self.budget.restricting(work, [tree.probabilities if tree else None for tree in drafted])

    def _verify(self, generation: Generation, tree: DraftTree, logits: torch.Tensor, base: int) -> None:
        """Adds what the pass says of `tree` to the reply, and keeps of its keys and values what belongs to it."""
        assert generation.past is not None
        before = generation.generated
        path = generation.verify(tree, logits)
        made = generation.generated - before
        generation.past.keep(base, path[:made])
        self.speculation.learn(generation, tree, path, made)
        self.totals.tokens_generated += made

    def _room_to_draft(self, generation: Generation) -> int:
        """Nodes that its past may take beside the last token, without anybody else's past having to go."""
        past = generation.past
        assert past is not None
        left = generation.most_tokens - past.tokens - 2
        turn = self.decoder.most_depth(past.tokens)
        left = left if turn is None else min(left, turn)
        wanted = past.tokens + 1 + min(self.speculation.most_nodes, left)
        if wanted > past.room:
            room = room_for(wanted, generation.most_tokens)
            nbytes = self._kv.nbytes(room)
            if self.nbytes + nbytes - generation.nbytes <= self._room_nbytes:
                past.make_room(room)
                generation.nbytes = nbytes
        return max(0, min(left, past.room - past.tokens - 1))

    @staticmethod
    def _account(shares: Sequence[Share], work: Sequence[Work], before: CacheCounters, after: CacheCounters) -> None:
        """Divides what the step asked for and moved by the tokens that each had in it, drafted ones included."""
        total = sum(len(item.tokens) for item in work)
        hits, misses = after.hits - before.hits, after.misses - before.misses
        nbytes = after.bytes_loaded - before.bytes_loaded
        for (generation, _), item in zip(shares, work, strict=True):
            part = len(item.tokens) / total
            generation.account(hits * part, misses * part, nbytes * part)

    # --- room --------------------------------------------------------------------------------------

    def _make_room(self, shares: Sequence[Share]) -> list[Share]:
        """Lets pasts grow for the step, the oldest first, and leaves out those that had to go for it."""
        order = {generation: place for place, generation in enumerate(self._running)}
        for generation, count in sorted(shares, key=lambda share: order[share.generation]):
            past = generation.past
            if past is None or past.tokens + count <= past.room:
                continue
            room = room_for(past.tokens + count, generation.most_tokens)
            nbytes = self._kv.nbytes(room)
            while not self._free(nbytes - generation.nbytes) and self._running[-1] is not generation:
                self._preempt(self._running[-1])
            if not self._free(nbytes - generation.nbytes) and len(self._running) > 1:
                self._preempt(generation)
                continue
            past.make_room(room)
            generation.nbytes = nbytes
        return [share for share in shares if share.generation.past is not None]

    def _free(self, nbytes: int) -> bool:
        """Drops kept pasts until there is room for `nbytes` more; whether there is."""
        while self.nbytes + nbytes > self._room_nbytes:
            if not self._prefixes.drop_oldest():
                return False
        return True

    def _keep_copy(self, generation: Generation) -> None:
        """Keeps a copy of a past that others will begin with, where there is room for it."""
        past, generation.pause_at = generation.past, None
        assert past is not None
        nbytes = self._kv.nbytes(past.tokens)
        if self._free(nbytes):
            self._prefixes.keep(generation.tokens[: past.tokens], past.fork(past.tokens, past.tokens), nbytes)
