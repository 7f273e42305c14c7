"""A loaded engine's expert cache gets another size while replies go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemoe import Engine, PlanError, Sampling
from edgemoe.cache.expert_cache import ExpertCache
from edgemoe.model.fused_attention import fused_of
from edgemoe.plan import memory_keeper
from edgemoe.scheduler.step_loop import PassAborted, StepLoop
from tests.support.waiting import wait_until

SETTINGS = Sampling(max_tokens=40, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def expected(talker: Path) -> tuple[int, ...]:
    with Engine.load(talker, threads=1, state_folder="none", speculate="off") as engine:
        return engine.generate("abc", SETTINGS).token_ids


@pytest.fixture(params=["off", "ngram+self"])
def engine(talker: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(talker, threads=2, state_folder="none", speculate=request.param) as loaded:
        yield loaded


def cache_of(engine: Engine) -> ExpertCache:
    assert engine._runtime is not None
    return engine._runtime.cache


def test_replies_are_the_same_while_the_cache_shrinks_and_grows(engine: Engine, expected: tuple[int, ...]) -> None:
    stream = engine.stream("abc", SETTINGS)
    tokens = list(next(stream).token_ids)
    sizes: Iterator[str | int] = iter([4, 20, "10%", "100%", 5, 32] * 10)
    for chunk in stream:
        tokens += chunk.token_ids
        plan = engine.resize(next(sizes))
        assert plan == engine.plan
        assert engine.stats.slots == plan.slots == cache_of(engine).pool.count
        engine._between_steps(lambda loop: cache_of(engine).check_integrity())
    assert tuple(tokens) == expected


def test_a_cache_that_has_grown_holds_everything_again(engine: Engine, expected: tuple[int, ...]) -> None:
    whole = engine.plan.slots
    assert engine.resize(3).slots == 3
    assert engine.resize("100%").slots == whole
    engine.generate("abc", SETTINGS)
    end = time.monotonic() + 10
    while not engine._between_steps(lambda loop: cache_of(engine).complete) and time.monotonic() < end:
        time.sleep(0.01)
    assert cache_of(engine).complete
    assert engine.generate("abc", SETTINGS).token_ids == expected


def test_programs_of_layers_do_not_pile_up() -> None:
    """They read the slots of the experts, which are others each time that all of them are resident again."""

    def programs(loop: StepLoop) -> int:
        found = map(fused_of, loop.runner.model.sequential.model.modules())
        return sum(len(fused._kept) for fused in found if fused is not None)

    with Engine.load(threads=1, context=256, state_folder="none", speculate="off") as engine:
        counts = []
        for _ in range(5):
            engine.resize(engine.plan.experts)
            engine.generate("abc", SETTINGS)
            counts.append(engine._between_steps(programs))
            engine.resize(engine.plan.experts // 2)
    assert counts[-1] == counts[1] > 0


def test_threads_resize_while_others_generate(engine: Engine, expected: tuple[int, ...]) -> None:
    wrong: list[tuple[int, ...]] = []

    def ask() -> None:
        for _ in range(3):
            found = engine.generate("abc", SETTINGS).token_ids
            if found != expected:
                wrong.append(found)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    size = 0
    while any(thread.is_alive() for thread in threads):
        size = (size + 7) % 31
        engine.resize(size + 1)
    assert wrong == []


@pytest.mark.parametrize("size", ["nothing", 0, "-1", "0%"])
def test_a_size_that_is_none_is_refused_and_changes_nothing(size: str | int, engine: Engine) -> None:
    before = engine.plan
    with pytest.raises(PlanError, match="expert_cache="):
        engine.resize(size)
    assert engine.plan == before


def test_an_idle_engine_gives_memory_back_and_takes_it_again(
    talker: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [1 << 40]
    monkeypatch.setattr("edgemoe.worker.loaded.MemoryKeeper", _keeper_of(free))
    monkeypatch.setattr(memory_keeper, "GROW_SECONDS", 0.5)
    monkeypatch.setattr(memory_keeper, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr("edgemoe.worker.worker.CHECK_SECONDS", 0.05)
    with Engine.load(talker, threads=1, state_folder="none", keep_free="1GiB") as engine:
        whole = engine.plan.slots
        free[0] = 1 << 20
        wait_until(lambda: engine.plan.slots < whole)
        assert engine.generate("abc", SETTINGS).token_ids == expected
        wait_until(lambda: engine.plan.slots == 1)
        assert engine.generate("abc", SETTINGS).token_ids == expected
        free[0] = 1 << 40
        wait_until(lambda: engine.plan.slots == whole)
        assert engine.generate("abc", SETTINGS).token_ids == expected
        assert engine.stats.slots == whole


@pytest.mark.parametrize("error", [PassAborted(), OSError(12, "Cannot allocate memory")])
def test_an_engine_whose_cache_cannot_shrink_now_goes_on(
    talker: Path,
    expected: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    free = [1 << 40]
    tried = threading.Event()
    monkeypatch.setattr("edgemoe.worker.loaded.MemoryKeeper", _keeper_of(free))
    monkeypatch.setattr(memory_keeper, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr("edgemoe.worker.worker.CHECK_SECONDS", 0.05)
    with Engine.load(talker, threads=1, state_folder="none", keep_free="1GiB") as engine:
        whole = engine.plan.slots

        def resize(counts: object) -> None:
            tried.set()
            raise error

        monkeypatch.setattr(cache_of(engine), "resize", resize)
        free[0] = 1 << 20
        assert tried.wait(20)
        assert engine.generate("abc", SETTINGS).token_ids == expected
        assert engine.plan.slots == whole
        monkeypatch.undo()
        if isinstance(error, PassAborted):
            wait_until(lambda: engine.plan.slots < whole)
        else:
            assert "the expert cache keeps its" in caplog.text
        assert engine.generate("abc", SETTINGS).token_ids == expected


def _keeper_of(free: list[int]) -> type[memory_keeper.MemoryKeeper]:
    class Keeper(memory_keeper.MemoryKeeper):
        def __init__(self, keep_free: int, planned: int, least: int, slot_nbytes: int) -> None:
            super().__init__(keep_free, planned, least, slot_nbytes, lambda: free[0])

    return Keeper


@pytest.mark.parametrize("keep", ["much", "-1GiB"])
def test_memory_to_keep_free_that_is_none_is_refused(keep: str, talker: Path) -> None:
    with pytest.raises(PlanError, match="keep_free="):
        Engine.load(talker, threads=1, state_folder="none", keep_free=keep)
