"""What an engine has when nobody asks anything of it."""

from __future__ import annotations

from edgemoe import Engine


def check_clean(engine: Engine) -> None:
    """Nothing is pinned, no slot is lost, and nobody runs or waits."""
    found = engine._between_steps(lambda loop: (loop.scheduler.running, loop.scheduler.waiting))
    assert found == (0, 0)
    runtime = engine._runtime
    assert runtime is not None
    cache = runtime.cache
    engine._between_steps(lambda loop: cache.check_integrity())
    assert all(held.pins == 0 for held in cache._held.values())
