"""Speeds of a card, measured on stand-ins whose every second is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edgemoe import Engine
from edgemoe.cache.cuda_link import Streams
from edgemoe.cache.host_buffer import HostBuffer
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.experts import expert_ffn
from edgemoe.experts.host_reads import DirectReads, HostRead
from edgemoe.measure import card_speed, profiler
from edgemoe.measure.card_speed import (
    LAUNCHES,
    MAX_COPIES,
    READS,
    cpu_kernel,
    kernel_speed,
    launch_seconds,
    link_and_kernel,
    measure_card,
    read_seconds,
)
from tests.support.profiles import CARD

NBYTES = 1000


class Clock:
    """Time that passes only where a stand-in says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class CountedStreams(Streams):
    """Copies that take `seconds` each, and longer while somebody reads the RAM beside them."""

    def __init__(self, clock: Clock, seconds: float, queueing: float = 0.0) -> None:
        self.clock, self.each, self.queueing = clock, seconds, queueing
        self.ends: list[float] = []
        self.sources: list[int] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[float, float]:
        assert target.nbytes == source.nbytes == NBYTES
        target.copy_(source)
        self.sources.append(int(source[0]))
        start = max(self.clock.now, self.ends[-1] if self.ends else 0.0)
        self.ends.append(start + self.each)
        self.clock.now += self.queueing
        return start, self.ends[-1]

    def passed(self, event: Any) -> bool:
        return bool(event <= self.clock.now)

    def block(self, event: Any) -> None:
        self.clock.now = max(self.clock.now, event)

    def seconds(self, start: Any, end: Any) -> float:
        return float(end - start)

    def staging(self, nbytes: int) -> HostBuffer:
        raise AssertionError("nothing is read")

    def mark(self) -> Any:
        raise AssertionError("nothing computes")

    def compute_after(self, event: Any) -> tuple[Any, Any] | None:
        raise AssertionError("nothing computes")


@pytest.fixture
def records() -> torch.Tensor:
    made = torch.zeros(3, NBYTES + 24, dtype=torch.uint8)
    made[:, 0] = torch.tensor([5, 6, 7])
    return made


def target() -> torch.Tensor:
    return torch.empty(NBYTES, dtype=torch.uint8)


def test_each_alone_and_beside_the_other(records: torch.Tensor) -> None:
    """The kernel takes 2 ms, and 4 ms beside copies; a copy takes 3 ms in any case."""
    clock = Clock()
    streams = CountedStreams(clock, 3e-3)

    def kernel() -> int:
        clock.now += 4e-3 if streams.ends[-1] > clock.now else 2e-3
        return 500

    pcie, cpu, pcie_beside, cpu_beside = link_and_kernel(streams, records, target(), kernel, clock)
    assert pcie == pytest.approx(NBYTES / 3e-3)
    assert cpu == pytest.approx(500 / 2e-3)
    assert cpu_beside == pytest.approx(500 / 4e-3)
    assert pcie_beside == pytest.approx(NBYTES / 3e-3)
    assert streams.sources[1:7] == [5, 6, 7, 5, 6, 7], "one record after the other"


def test_copies_count_beside_the_kernel_only_where_it_runs(records: torch.Tensor) -> None:
    """Queueing takes longer than a copy: those that ended before the last was queued had the RAM for themselves."""
    clock = Clock()
    streams = CountedStreams(clock, 2e-3, queueing=1.9e-3)
    began: list[int] = []

    def kernel() -> int:
        if not began and len(streams.ends) > 1 + 125:
            began.append(sum(end <= clock.now for end in streams.ends[-125:]))
            # The copies that are left take twice the time.
            first = len(streams.ends) - 125 + began[0]
            for number in range(first, len(streams.ends)):
                streams.ends[number] = streams.ends[number - 1] + 4e-3
        clock.now += 1e-3
        return 1

    _, _, pcie_beside, _ = link_and_kernel(streams, records, target(), kernel, clock)
    assert 100 < began[0] < 125
    assert pcie_beside < NBYTES / 2e-3


def test_without_a_kernel_nothing_is_beside_the_copies(records: torch.Tensor) -> None:
    streams = CountedStreams(Clock(), 3e-3)
    assert link_and_kernel(streams, records, target(), None) == pytest.approx((NBYTES / 3e-3, 0.0, NBYTES / 3e-3, 0.0))


@pytest.mark.parametrize(("seconds", "copies"), [(1e-6, MAX_COPIES), (0.05, 5), (10.0, 2)])
def test_as_many_copies_as_the_time_and_the_queue_allow(seconds: float, copies: int, records: torch.Tensor) -> None:
    streams = CountedStreams(Clock(), seconds)
    link_and_kernel(streams, records, target(), None)
    assert len(streams.ends) == 1 + copies


def test_a_kernel_that_ends_after_all_else_is_not_counted() -> None:
    clock = Clock()
    took = iter([2.0, 2.0, 5.0])

    def kernel() -> int:
        clock.now += next(took)
        return 10

    assert kernel_speed(kernel, lambda: clock.now <= 4.0, clock) == pytest.approx(20 / 4.0)


def test_one_run_of_a_kernel_counts_in_any_case() -> None:
    clock = Clock()

    def kernel() -> int:
        clock.now += 2.0
        return 10

    assert kernel_speed(kernel, lambda: False, clock) == pytest.approx(5.0)


def test_the_time_to_queue_a_kernel_leaves_out_the_wait_for_the_device() -> None:
    clock, finished = Clock(), list[float]()

    class Value:
        """A tensor whose kernels take 2 us to queue, and in the first run 9 us."""

        def fill_(self, value: float) -> None:
            clock.now += 9e-6 if len(finished) == 1 else 2e-6

    def finish() -> None:
        clock.now += 1.0
        finished.append(clock.now)

    value: Any = Value()
    assert launch_seconds(value, finish, clock) == pytest.approx(2e-6)
    assert len(finished) == 1 + card_speed.TRIES + 1
    assert LAUNCHES < 1000


def test_the_time_of_a_host_read_is_that_of_its_wait() -> None:
    clock = Clock()

    class Slow(DirectReads):
        """Reads that take 14 us."""

        def start(self, values: Sequence[torch.Tensor]) -> HostRead:
            clock.now += 14e-6
            return super().start(values)

    assert read_seconds(Slow(), torch.zeros(8, dtype=torch.int32), clock) == pytest.approx(14e-6)
    assert READS > 1


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.load(None, device="cpu", expert_cache="50%", state_folder="none") as made:
        yield made


def test_a_whole_card_with_the_cpu_in_its_place(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records and the kernels are real; copies take 2 ms and reads none."""
    runtime, moe = engine._runtime, open_blueprint(None).experts_modules[0]
    assert runtime is not None
    clock = Clock()

    class Fixed(CountedStreams):
        def __init__(self, device: torch.device) -> None:
            super().__init__(clock, 2e-3)

        def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[float, float]:
            assert target.nbytes == moe.layout.nbytes
            assert bool(source.any()), "a record was read"
            self.ends.append((self.ends[-1] if self.ends else 0.0) + 2e-3)
            return self.ends[-1] - 2e-3, self.ends[-1]

        def passed(self, event: Any) -> bool:
            self.clock.now += 1e-3
            return super().passed(event)

    monkeypatch.setattr(card_speed, "CudaStreams", Fixed)
    monkeypatch.setattr(card_speed, "DeviceReads", lambda device: DirectReads())
    monkeypatch.setattr("edgemoe.cache.accelerator.synchronize", lambda device: None)
    monkeypatch.setattr(card_speed, "WINDOW_SECONDS", 0.02)
    found = measure_card(runtime, moe, 4)
    assert [found.pcie, found.pcie_beside] == pytest.approx([moe.layout.nbytes / 2e-3] * 2)
    assert min(found.vram, found.cpu, found.cpu_beside, found.launch_seconds, found.read_seconds) > 0
    assert 0 < found.cpu_share < 1


def test_a_profile_measures_a_card_and_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(profiler, "measure_card", lambda *of: asked.append(of) or CARD)  # type: ignore[func-returns-value]
    blueprint = open_blueprint(None)
    at: Any = SimpleNamespace(plan=SimpleNamespace(device="cpu", top_k=4), runtime="loaded")
    assert profiler._card_speed(blueprint, at) is None
    assert asked == []
    at.plan.device = "cuda:0"
    assert profiler._card_speed(blueprint, at) == CARD
    assert asked == [("loaded", blueprint.experts_modules[0], 4)]


def test_the_kernel_reads_records_in_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, moe = engine._runtime, open_blueprint(None).experts_modules[0]
    assert runtime is not None
    module, dtype = moe.module(runtime.model), runtime.model.dtype
    slots: list[list[int]] = []
    monkeypatch.setattr(
        expert_ffn.FastExperts, "compute", lambda self, groups, experts, chosen: slots.append(list(chosen))
    )
    with card_speed.some_records(runtime.cache.store, moe) as records:
        assert len(records) == moe.experts == 32
        kernel = cpu_kernel(module, moe, records[:6], 4, runtime.kernel_threads, dtype)
        assert kernel is not None
        assert [kernel() for _ in range(3)] == [4 * moe.layout.nbytes] * 3
    assert slots == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]
    monkeypatch.setattr(expert_ffn.FastExperts, "fits", staticmethod(lambda moe: False))
    assert cpu_kernel(module, moe, records, 4, runtime.kernel_threads, dtype) is None
