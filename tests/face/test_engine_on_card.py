"""A whole engine on a CPU that is taken for a card: its tokens, what it says of itself, and what `close` gives back."""

from __future__ import annotations

import gc
import weakref

import pytest

from bench.support.no_card.quick_interpreter import quick_interpreter
from edgemoe import Engine, Sampling
from tests.support import pretend_card
from tests.support.checkpoints import Zoo, random_ids

pytest.importorskip("triton")

GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("speculate", ["off", "self"])
def test_replies_are_those_of_the_cpu_and_close_gives_everything_back(
    zoo: Zoo, speculate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompt = zoo("qwen3_moe", num_hidden_layers=2), random_ids(6, seed=4)

    def load() -> Engine:
        return Engine.load(
            folder,
            device="cpu",
            expert_cache="60%",
            batch=1,
            context=64,
            speculate=speculate,
            state_folder="none",
        )

    def reply(engine: Engine) -> list[int]:
        return [token for chunk in engine.stream(prompt, GREEDY) for token in chunk.token_ids]

    with load() as engine:
        expected = reply(engine)
        assert engine.stats.device_passes == ""
    pretend_card.install(monkeypatch)
    with quick_interpreter():
        engine = load()
        assert reply(engine) == expected
        assert engine.stats.device_passes == "graphs"
        runtime = engine._loaded()
        slots, runner = weakref.ref(runtime.cache.pool._map), runtime.runner()
        graphs = weakref.ref(next(iter(engine._loop.runner.model._graphs._graphs.values())))  # type: ignore[union-attr]
        engine.close()
    gc.collect()
    assert slots() is None
    assert graphs() is None
    # What was referred to meanwhile is still there, the engine too.
    assert runner.layers.layers == []
    assert engine.plan.slots > 0
