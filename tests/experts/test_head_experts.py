"""The experts of a draft head: what its passes compute where some are missing, and what is loaded for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.support.engine_parts import runner_of, speculation_of
from bench.support.zoo_heads import imitating, make_with_head
from edgemoe import Engine, Sampling
from edgemoe.cache import ExpertId
from edgemoe.draft.head_drafter import HeadDrafter
from edgemoe.draft.pass_drafter import TRIES
from edgemoe.experts.head_experts import HeadExperts
from edgemoe.model.head_runner import HeadInput, HeadOutput
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import random_ids
from tests.support.crowd import assert_same_reply

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "state_folder": "none",
    "prefetch": "off",
    "draft_shape": "chain",
}
GREEDY = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
FEW = 12
"""Slots, of the experts of five layers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet_transformers():
        return imitating(make_with_head("qwen3_moe", tmp_path_factory.mktemp("head") / "model"), effect=0.3)


def load(folder: Path, **options: Any) -> Engine:
    return Engine.load(folder, **SETTINGS | {"speculate": "mtp"} | options)


def drafter_of(engine: Engine) -> HeadDrafter:
    passes = speculation_of(engine)._passes
    assert isinstance(passes, HeadDrafter)
    return passes


def experts_of(engine: Engine) -> HeadExperts:
    return drafter_of(engine)._experts


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """One whose head does with what is resident, of a cache that has few slots."""
    with load(folder, expert_cache=FEW) as engine:
        monkeypatch.setattr(drafter_of(engine)._routings, "next", lambda: "resident")
        yield engine


def head_layer(engine: Engine) -> int:
    (layer,) = experts_of(engine)._own
    return layer


def test_no_pass_of_the_head_requests_an_expert(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, head = experts_of(engine)._cache, drafter_of(engine)._head
    # Both kinds of hidden states are tried once, by passes that have nothing to do with drafts.
    engine.generate(random_ids(24), GREEDY)
    run, passes = head.run, list[int]()

    def running(inputs: Sequence[HeadInput]) -> list[HeadOutput]:
        before = cache.counters.copy()
        found = run(inputs)
        assert cache.counters == before
        passes.append(len(inputs))
        return found

    monkeypatch.setattr(head, "run", running)
    accepted = engine.stats.accepted
    reply = engine.generate(random_ids(24), GREEDY)
    assert len(passes) > 10
    assert engine.stats.accepted > accepted, "and its drafts are of use"
    with load(folder, speculate="off") as plain:
        assert_same_reply(reply, plain.generate(random_ids(24), GREEDY))


def test_with_every_expert_resident_it_routes_as_it_was_trained(folder: Path) -> None:
    with load(folder, expert_cache="100%") as engine:
        assert experts_of(engine).complete
        engine.generate(random_ids(24), GREEDY)
        assert drafter_of(engine)._routing is None


def test_both_ways_are_tried_where_experts_are_missing(folder: Path) -> None:
    with load(folder, expert_cache=FEW) as engine:
        assert not experts_of(engine).complete
        engine.generate(random_ids(24), Sampling(max_tokens=120, temperature=0.9, seed=3, ignore_eos=True))
        assert min(drafter_of(engine)._routings._cycles.values()) >= TRIES


def test_what_is_missed_most_is_loaded(engine: Engine) -> None:
    cache, experts, layer = experts_of(engine)._cache, experts_of(engine), head_layer(engine)
    held = cache.residents(layer)
    missing = [number for number in range(cache.store.experts[layer]) if not cache.holds(ExpertId(layer, number))]
    assert len(missing) > 1
    experts._wanted[layer] = torch.zeros(cache.store.experts[layer])
    experts.load_missed()
    assert not any(cache.holds(ExpertId(layer, number)) for number in missing), "nothing was wanted yet"
    experts._wanted[layer][held] = 0.5
    experts._wanted[layer][missing[0]] = 0.4
    if held:
        experts.load_missed()
        assert not cache.holds(ExpertId(layer, missing[0])), "all that are resident were wanted more"
    experts._wanted[layer][missing[1]] = 0.6
    experts.load_missed()
    assert cache.holds(ExpertId(layer, missing[1]))
    assert not cache.holds(ExpertId(layer, missing[0]))


def test_only_the_rows_that_are_read_count_as_wanted(engine: Engine) -> None:
    """A pass over a whole prompt has many rows, of which the last one alone gives a draft."""
    experts, head, layer = experts_of(engine), drafter_of(engine)._head, head_layer(engine)
    experts._wanted[layer] = torch.zeros_like(experts._wanted[layer])
    rows = 20
    size = runner_of(engine).sequential.model.config.hidden_size
    hidden = torch.randn(rows, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), experts.resident_only([rows - 1]):
        head.run([HeadInput(head.start(rows), random_ids(rows), hidden, 1)])
    wanted = experts._wanted[layer]
    assert int((wanted > 0).sum()) == engine.plan.top_k
    assert float(wanted.sum()) == pytest.approx(1.0, abs=1e-5)
