"""Random prefetches and demand loads over real files and threads, with failing reads: no byte is wrong."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench.support.policies.lru import BalancedLRU
from edgemoe.cache import ExpertCache, ExpertId, Part, RecordLayout, SlotClass, SlotPool, Throttle
from edgemoe.cache import safetensors_store as store_module
from edgemoe.cache.reader_link import ReaderLink
from edgemoe.cache.safetensors_store import Extent, RecordSource, SafetensorsStore
from edgemoe.cache.store import Piece
from edgemoe.prefetch.link_gauge import LinkGauge
from edgemoe.prefetch.prefetcher import Prefetcher
from tests.support.cache_fakes import holds, pattern
from tests.support.waiting import wait_until

EXPERTS = (8, 5, 12)
PARTS = (1024, 2048)
NBYTES = sum(PARTS)
PATIENCE = 60.0


class Unsteady(SafetensorsStore):
    """A store whose reads are randomly slow, and fail at the rate `failing`."""

    def __init__(self, path: Path, draw: random.Random) -> None:
        layout = RecordLayout([Part(f"p{number}", (size,), torch.uint8) for number, size in enumerate(PARTS)])
        sources, at = {}, 0
        with path.open("wb") as file:
            for layer, count in enumerate(EXPERTS):
                for expert in (ExpertId(layer, number) for number in range(count)):
                    extents = []
                    for size, offset in zip(PARTS, layout.offsets, strict=True):
                        file.write(bytes([0] * 7) + bytes([pattern(expert)]) * size)
                        extents.append(Extent(0, at + 7, (size,), torch.uint8, size, offset))
                        at += 7 + size
                    sources[expert] = RecordSource(tuple(extents), None)
        super().__init__([path], [layout] * len(EXPERTS), sources)
        self.failing = 0.0
        """Probability that a read fails."""
        self._draw = draw

    def pieces(self, expert: ExpertId, slot: torch.Tensor) -> Sequence[Piece]:
        return [(nbytes, self._unsteady(move)) for nbytes, move in super().pieces(expert, slot)]

    def _unsteady(self, move: Callable[[], None]) -> Callable[[], None]:
        def unsteady() -> None:
            if self._draw.random() < 0.1:
                time.sleep(self._draw.random() * 0.002)
            if self._draw.random() < self.failing:
                raise OSError("disk gone")
            move()

        return unsteady


class Passes:
    """Passes through all layers, some after drafts, with predictions that are often wrong."""

    def __init__(self, store: Unsteady, link: ReaderLink, slots: int, draw: random.Random) -> None:
        self.pool = SlotPool([SlotClass(store.slot_nbytes, slots)], torch.device("cpu"))
        self.cache = ExpertCache(store, link, self.pool, BalancedLRU(len(EXPERTS), slots))
        self.prefetcher = Prefetcher(self.cache, len(EXPERTS), LinkGauge(link))
        self.prefetcher.register("one", 2, prior=0.6)
        self.prefetcher.register("other", 3, prior=0.4)
        self.failures = 0
        self._draw = draw

    def run(self, count: int) -> None:
        for _ in range(count):
            self._pass([self._some(layer) for layer in range(len(EXPERTS))])
            self.prefetcher.drop()
            self.cache.check_integrity()

    def wait(self) -> None:
        """Until no load is in flight."""
        wait_until(lambda: all(held.transfer is None or held.transfer.done for held in self.cache._held.values()))

    def _some(self, layer: int) -> list[int]:
        return self._draw.sample(range(EXPERTS[layer]), self._draw.randint(1, 5))

    def _predict(self, predictor: str, count: int, layer: int, requested: Sequence[int]) -> None:
        bins = {
            number: self._draw.randrange(count)
            for number in [*requested, *self._some(layer)]
            if self._draw.random() < 0.8
        }
        self.prefetcher.add_prediction(predictor, layer, bins, self.cache.residents(layer))

    def _pass(self, requested: Sequence[Sequence[int]]) -> None:
        draft = self._draw.random() < 0.5
        for layer in range(len(EXPERTS) if draft else 0):
            with self.cache.lend(layer, self.cache.residents(layer)) as loan:
                self._check(layer, loan.experts, loan.slots)
            self._predict("other", 3, layer, requested[layer])
            self.prefetcher.issue()
        if self._draw.random() < 0.1:
            self.prefetcher.drop()
        for layer, numbers in enumerate(requested):
            self._reach(layer, numbers, requested)

    def _reach(self, layer: int, numbers: Sequence[int], requested: Sequence[Sequence[int]]) -> None:
        def meanwhile() -> None:
            if layer + 1 < len(EXPERTS):
                self._predict("one", 2, layer + 1, requested[layer + 1])
            self.prefetcher.issue(layer)

        self.prefetcher.enter_layer(layer, numbers)
        seen: list[int] = []
        try:
            for loan in self.cache.borrow(layer, numbers, meanwhile):
                if self._draw.random() < 0.1:
                    time.sleep(self._draw.random() * 0.002)
                self._check(layer, loan.experts, loan.slots)
                seen += loan.experts
        except OSError:
            self.failures += 1
        else:
            assert sorted(seen) == sorted(numbers)

    def _check(self, layer: int, experts: Sequence[int], slots: Sequence[int]) -> None:
        for number, slot in zip(experts, slots, strict=True):
            assert holds(self.cache.region(layer).memory[slot], ExpertId(layer, number), NBYTES)


def within_patience(work: Callable[[], None]) -> None:
    """Runs `work` in a thread. Fails when it does not end in time."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "a pass waits forever"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("slots", [1, 2, 4, 9, sum(EXPERTS)])
@pytest.mark.parametrize("failing", [0.0, 0.02, 0.1], ids=["", "failing", "often-failing"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_random_passes_read_the_right_bytes_and_come_to_an_end(
    slots: int, failing: float, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PIECE_NBYTES", 700)
    draw = random.Random(slots)
    store = Unsteady(tmp_path / "experts", draw)
    link = ReaderLink(store, threads, Throttle(draw.choice([5e6, 50e6])))
    passes = Passes(store, link, slots, draw)
    store.failing = failing
    try:
        within_patience(lambda: passes.run(40))
        passes.wait()
        store.failing = 0.0
        failed = passes.failures
        within_patience(lambda: passes.run(15))
        passes.wait()
    finally:
        link.close()
        store.close()
    counters = passes.cache.counters
    assert passes.failures == failed, "reads succeed again"
    assert (failed > 0) == (failing > 0) or slots == sum(EXPERTS), "in that case there are few reads"
    assert counters.hits + counters.misses > 150
    assert slots == 1 or counters.bytes_prefetched_used + counters.bytes_prefetched_late > 0
    if not failing:
        unrequested = sum(held.load_reason is not None for held in passes.cache._held.values())
        assert counters.bytes_loaded + unrequested * NBYTES == link.bytes_moved
