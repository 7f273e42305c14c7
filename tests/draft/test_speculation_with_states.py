"""Families whose states are kept for drafted tokens: what an engine says of it, and how much it keeps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edgemoe import Engine, Sampling
from edgemoe.model.kv_cache import SequenceCache
from tests.support.checkpoints import Zoo, random_ids


@pytest.mark.parametrize(("family", "drafter"), [("lfm2_moe", "self"), ("deepseek_v4", "ngram"), ("minimax", "self")])
def test_replies_are_those_of_plain_decoding(family: str, drafter: str, zoo: Zoo) -> None:
    asked = [(random_ids(7, seed) * 4, Sampling(max_tokens=30, temperature=0.0, ignore_eos=True)) for seed in range(3)]
    with Engine.load(zoo(family), threads=1, dtype="float32", speculate="off") as engine:
        expected = [engine.generate(*each).token_ids for each in asked]
    with Engine.load(zoo(family), threads=1, dtype="float32", speculate=drafter, draft_nodes=6) as engine:
        found = dict(engine.generate_batch(asked))
        assert engine.stats.accepted > 0
    assert [getattr(found[place], "token_ids", None) for place in range(3)] == expected


def test_no_step_keeps_more_states_than_the_plan_has_memory_for(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    rollback = SequenceCache.rollback

    def counting(self: SequenceCache, base: int, rows: Sequence[int] = ()) -> None:
        kept.append(self.kept_nbytes)
        rollback(self, base, rows)

    with Engine.load(zoo("qwen3_next"), threads=1, dtype="float32", speculate="ngram", batch=1) as engine:
        scheduler, state = engine._loop.scheduler, engine.plan.kv.state_nbytes
        assert scheduler._max_states == engine.plan.kept_states
        scheduler._max_states = 5
        monkeypatch.setattr(SequenceCache, "rollback", counting)
        engine.generate(random_ids(5) * 6, Sampling(max_tokens=40, temperature=0.0))
    assert 3 * state <= max(kept) <= 5 * state
