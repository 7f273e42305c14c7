"""One random schedule of requests, drafts, prefetches and what goes wrong, with what should come of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.no_card.stand_in.engine import MAX_TOKENS, StandInEngine, Workshop
from bench.no_card.stand_in.kernels import Ledger
from bench.no_card.stand_in.lanes import Deadlock
from edgemoe.cache import ExpertId
from edgemoe.experts.router_hook import Choice
from edgemoe.kernels.triton.launcher import Launch
from tests.support.cache_fakes import pattern

TOP_K = 2
WEIGHTS = (0.25, 0.5, 1.0, 1.0, 2.0, 0.0)
"""Sums of these times small integers are exact. A pair of weight 0 is not computed."""
ABORTED, MAX_OPERATIONS = 0.2, 10
"""The share of passes that are aborted, and before which of their operations at the latest."""
READ = "a read"
"""The operation before which half of them are: its kernels are then queued, and the device may have done none."""
AT_ONCE = 0.8
"""The share of these that prefetches follow at once, while the device has all of their work before it."""
UNASKED = 0.4
"""The share of a layer's two moments for predictions in which there are some."""


class Aborted(Exception):
    """Stands for whatever ends a pass at an arbitrary place."""


class DraftRouting:
    """A `RoutingOverride` that leaves the choice as it is: kernels compute what the table has of it."""

    resident_only = True

    def choose(self, layer: int, choice: Choice) -> torch.Tensor:
        """See the base class."""
        return choice.scores

    def substitute(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        return index, weights


class Schedule:
    """An engine from its first request to its end. It is also the predictor of its layers, and has no idea."""

    def __init__(self, workshop: Workshop, seed: int) -> None:
        self.seed = seed
        self.story: list[str] = []
        """What was asked of the engine."""
        self._draw = random.Random(seed)
        self._engine = StandInEngine(workshop, self._draw, self)
        self._hidden = workshop.hidden
        self._ledgers: list[Ledger] = []
        self._aborted = 0
        self._abort_in, self._abort_at = 0, ""
        workshop.launcher.observer = self._launch
        self._engine.reads.before_wait = lambda: self._operation(READ)

    def counts(self) -> dict[str, int]:
        """How much has happened."""
        engine = self._engine
        return {
            "passes": len(self._ledgers),
            "aborted": self._aborted,
            "copies": engine.streams.copies,
            "records_read": engine.kernels.reads,
            "device_steps": engine.device.steps,
        }

    def run(self) -> list[str]:
        """Everything that was wrong. After the first wrong read nothing more is begun."""
        engine, draw = self._engine, self._draw
        others = [self._draft, self._prefetch, self._fill, self._cancel, self._rest]
        passes = draw.randint(3, 6)
        try:
            while passes and not engine.kernels.faults:
                if draw.random() < 0.5:
                    self._request()
                    passes -= 1
                else:
                    draw.choice(others)()
                engine.cache.check_integrity()
            engine.finish()
        except Deadlock as error:
            return [*engine.kernels.faults, str(error)]
        found = [fault for ledger in self._ledgers for fault in ledger.faults()]
        return [*engine.kernels.faults, *found, *self._faults_of_table()]

    def _faults_of_table(self) -> list[str]:
        """Whether the table says at the end what the cache does, and the slots hold what it says."""
        table, cache = self._engine.table, self._engine.cache
        found = []
        for layer, row in enumerate(table.device_table.tolist()):
            readable = table.readable[layer]
            memory = cache.region(layer).memory.numpy()
            for number, slot in enumerate(row):
                if slot != readable.get(number, -1):
                    found.append(f"the table has slot {slot} for expert {number} of layer {layer}: {readable}")
                elif slot >= 0 and set(memory[slot].tobytes()) != {pattern(ExpertId(layer, number))}:
                    found.append(f"slot {slot} does not hold expert {number} of layer {layer}")
        return found

    # --- what is asked of the engine -----------------------------------------------------------------

    def _request(self) -> None:
        layer = self._draw.randrange(len(self._engine.experts))
        self._may_abort(lambda: self._pass(layer, draft=False))

    def _draft(self) -> None:
        self._may_abort(self._drafting_pass)

    def _drafting_pass(self) -> None:
        engine = self._engine
        with engine.layers.overriding(DraftRouting()):
            for layer in range(len(engine.experts)):
                self._pass(layer, draft=True)
        # The host reads which experts the pass would have chosen before it goes on.
        engine.reads.start([]).wait()

    def _pass(self, layer: int, *, draft: bool) -> None:
        draw, engine = self._draw, self._engine
        tokens = draw.randint(1, MAX_TOKENS)
        count = engine.experts[layer]
        experts = [number for _ in range(tokens) for number in draw.sample(range(count), TOP_K)]
        weights = [draw.choice(WEIGHTS) for _ in experts]
        if draw.random() < 0.1:
            # Some families choose an expert beyond the last one where they want none.
            experts[draw.randrange(len(experts))] = count
        ledger = Ledger(layer, [each if each < count else -1 for each in experts], weights, TOP_K, draft=draft)
        self._ledgers.append(ledger)
        engine.kernels.ledger = ledger
        self.story.append(f"{'draft' if draft else 'request'} of layer {layer}: {experts}, weights {weights}")
        index, shares = torch.tensor(experts).view(tokens, TOP_K), torch.tensor(weights).view(tokens, TOP_K)
        ledger.out = engine.layers.forward(engine.layers.layers[layer], self._hidden[:tokens], index, shares)

    def _may_abort(self, run: Callable[[], None]) -> None:
        draw = self._draw
        if draw.random() < ABORTED:
            self._abort_in, self._abort_at = draw.choice(((draw.randint(1, MAX_OPERATIONS), ""), (-1, READ)))
        try:
            run()
        except (Aborted, OSError) as error:
            self.story.append(f"aborted: {error!r}")
            self._aborted += 1
            self._abort_in, self._abort_at = 0, ""
            if self._draw.random() < AT_ONCE:
                self._prefetch(needed=())
                self._rest()
        self._abort_in, self._abort_at = 0, ""

    def _prefetch(self, needed: Sequence[ExpertId] | None = None) -> None:
        some = self._some()
        self.story.append(f"prefetch {some}")
        self._engine.cache.prefetch(some, self._some() if needed is None else needed)

    def _fill(self) -> None:
        some = self._some()
        self.story.append(f"fill {some}")
        self._engine.cache.fill(some)

    def _cancel(self) -> None:
        some = self._some()
        self.story.append(f"cancel {some}")
        self._engine.cache.cancel_prefetches(some)

    def _rest(self) -> None:
        """The host does nothing for a while."""
        for _ in range(self._draw.randint(1, 30)):
            self._engine.turns.pause()

    def _some(self) -> list[ExpertId]:
        return self._draw.sample(self._engine.every, self._draw.randint(1, 4))

    # --- what the engine asks ------------------------------------------------------------------------

    def _launch(self, launch: Launch) -> None:
        """A launch is queued, or fails."""
        self._engine.turns.pause()
        self._operation("a launch")
        self._engine.kernels.queue(launch)

    def queue_scores(self, layer: int, hidden: torch.Tensor, top_k: int) -> list[torch.Tensor]:
        """See `ExpertPredictor`."""
        self._operation("scores")
        return []

    def enter_layer(self, layer: int, wanted: Sequence[int], hidden: torch.Tensor, scores: Any = None) -> None:
        """See `ExpertPredictor`, whose prefetcher cancels what turns out to be wrong."""
        self._operation("entering a layer")
        if self._draw.random() < UNASKED:
            self._cancel()

    def predict_next(self, layer: int, hidden: torch.Tensor, top_k: int, scores: Any = None) -> None:
        """See `ExpertPredictor`, whose prefetcher starts what is worth it."""
        self._operation("a prediction")
        if self._draw.random() < UNASKED:
            self._prefetch()

    def _operation(self, name: str) -> None:
        """Raises Aborted where the pass is to end here."""
        self._abort_in -= 1
        if self._abort_in == 0 or self._abort_at == name:
            raise Aborted(name)
