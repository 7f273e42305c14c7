"""A process that forks after it has loaded an engine."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from edgemoe import EdgeMoEError, Engine, Sampling
from tests.support.checkpoints import PROMPT, Zoo

SAMPLING = Sampling(max_tokens=3, temperature=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_is_told_instead_of_hanging(zoo: Zoo) -> None:
    """benoitc/gunicorn#1891: a server that loads the model before it forks its workers."""
    with Engine.load(zoo("mixtral"), expert_cache="20%", device="cpu", state_folder="none") as engine:
        before = engine.generate(PROMPT, SAMPLING).token_ids
        child = os.fork()
        if child == 0:
            # Nothing of pytest may run in the child.
            os._exit(told(engine))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert engine.generate(PROMPT, SAMPLING).token_ids == before, "the parent goes on"


def told(engine: Engine) -> int:
    """In the child: 0 where every call says what is wrong, and `close` returns."""
    calls: list[Callable[[], object]] = [
        lambda: engine.generate(PROMPT, SAMPLING),
        lambda: next(engine.stream(PROMPT, SAMPLING)),
        lambda: next(engine.generate_batch([(PROMPT, SAMPLING)])),
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except EdgeMoEError as error:
            if "loaded by another process" not in str(error):
                return 10 + number
        else:
            return 20 + number
    engine.close()
    return 0
