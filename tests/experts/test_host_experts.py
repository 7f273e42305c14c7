"""Experts that the CPU computes from their records in RAM, beside a card: the same outputs, and nothing loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from edgemoe import EdgeMoEError, Engine, Sampling
from edgemoe.cache import ExpertCache, ExpertId, host_store
from edgemoe.cache.host_store import HostStore
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.cache.slots import SlotRegion
from edgemoe.checkpoint.blueprint import Blueprint, read_blueprint
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.dense_loader import load_dense
from edgemoe.experts.expert_ffn import FastExperts, PlainExperts, TokenGroups
from edgemoe.experts.host_experts import MAX_TOKENS, CpuHelp, HostExperts
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.runtime import Runtime
from tests.support import pretend_card
from tests.support.checkpoints import CPU, Zoo

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated": ("qwen3_moe", {}),
    "transposed, biased, interleaved": ("gpt_oss", {}),
    "packed": ("qwen3_moe", {"experts": "int8"}),
}
ORDER = 1e-5
"""How far sums in float32 may be apart that were added in another order, relative to the largest."""


# --- the kernels on records in RAM ------------------------------------------------------------------


@contextmanager
def in_ram(zoo: Zoo, kind: str) -> Iterator[tuple[Blueprint, Any, HostStore]]:
    """A checkpoint's experts in RAM, and its model without them."""
    family, settings = KINDS[kind]
    blueprint = read_blueprint(open_checkpoint(zoo(family)), "auto", settings.get("experts", "native"))
    layouts = [moe.layout for moe in blueprint.experts_modules]
    files = SafetensorsStore(blueprint.checkpoint.files, layouts, blueprint.records)
    host = HostStore(files, 0, pin=False)
    try:
        host.fill(1, lambda done, total: None)
        yield blueprint, load_dense(blueprint, CPU, lambda done, total: None), host
    finally:
        host.close()
        files.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slab", [1, 3, 1000])
def test_outputs_are_those_of_the_plain_form(zoo: Zoo, kind: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a layer's records in one piece of memory, in several, and each in its own."""
    with in_ram(zoo, kind) as (_, _, whole):
        largest = whole.slot_nbytes
    monkeypatch.setattr(host_store, "SLAB_NBYTES", slab * largest)
    with in_ram(zoo, kind) as (blueprint, model, host), torch.inference_mode():
        threads = KernelThreads(1)
        layer, moe = 1, blueprint.experts_modules[1]
        module = moe.module(model)
        help = CpuHelp(host, 1.0, threads, model.dtype)
        own = help.layer(layer, module, moe)
        assert own is not None
        for tokens in (1, 5):
            hidden = torch.randn(tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(tokens))
            index = torch.tensor([[6, 1], [7, 6], [0, 5], [2, 6], [6, 3]])[:tokens]
            rows = TokenGroups(hidden, index, torch.ones(tokens, 2), moe.experts).rows
            chosen = list(rows)[:-1] if tokens > 1 else list(rows)
            pairs, found = own.compute(hidden, rows, 2, chosen)
            assert sorted(pairs) == sorted(pair for expert in chosen for pair in rows[expert])
            expected = plainly(blueprint, model, host, layer, hidden, index)[pairs]
            assert (found - expected).abs().max() <= ORDER * expected.abs().max()
        help.close()
        threads.close()


def plainly(
    blueprint: Blueprint, model: Any, host: HostStore, layer: int, hidden: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """The outputs of all pairs by the reference arithmetic, [pairs, hidden size]."""
    moe = blueprint.experts_modules[layer]
    records = torch.stack([host.record(ExpertId(layer, number))[0] for number in range(moe.experts)])
    plain = PlainExperts(moe.module(model), moe, SlotRegion(records, 0))
    groups = TokenGroups(hidden, index, torch.ones(index.shape), moe.experts)
    plain.compute(groups, groups.wanted, groups.wanted)
    return groups.outputs


@pytest.mark.parametrize(
    ("share", "missing", "taken"), [(0.5, 0, 0), (0.5, 1, 0), (0.5, 3, 1), (0.7, 10, 7), (1.0, 3, 3), (0.3, 3, 0)]
)
def test_the_coldest_are_taken_and_the_share_is_rounded_down(share: float, missing: int, taken: int) -> None:
    experts = list(range(20, 20 + missing))
    assert HostExperts(share, {}).part_of(experts) == experts[:taken]


def test_experts_without_kernels_are_left_to_the_device(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_ram(zoo, "packed") as (blueprint, model, host):
        moe = blueprint.experts_modules[0]
        assert FastExperts.fits(moe)
        monkeypatch.setattr("edgemoe.kernels.cpu.packed.packed_matrix.fits", lambda kind, columns: False)
        assert not FastExperts.fits(moe)
        help = CpuHelp(host, 1.0, KernelThreads(1), model.dtype)
        assert help.layer(0, moe.module(model), moe) is None


# --- beside a card ----------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Engines take the CPU for a card. Passes are not captured, which takes long and changes no expert."""
    pytest.importorskip("triton")
    pretend_card.install(monkeypatch)
    monkeypatch.setattr(Runtime, "_device_passes", lambda runtime: None)
    return monkeypatch


def loaded(zoo: Zoo, kind: str, share: float | str, **settings: Any) -> Engine:
    """With slots for a quarter of the experts."""
    family, how = KINDS[kind]
    fixed: dict[str, Any] = {
        "device": "cpu",
        "expert_cache": 9,
        "speculate": "off",
        "prefetch": "off",
        "context": 64,
        "batch": 1,
    }
    return Engine.load(zoo(family), cpu_share=share, threads=2, state_folder="none", **fixed | how | settings)


def cache_of(engine: Engine) -> ExpertCache:
    assert engine._runtime is not None
    return engine._runtime.cache


PROMPT, REPLY = [5, 9], Sampling(temperature=0, max_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_replies_are_the_same_with_any_share(zoo: Zoo, kind: str, card: pytest.MonkeyPatch) -> None:
    replies, by_cpu, moved = [], [], []
    for share in ("off", 0.5, "100%"):
        with loaded(zoo, kind, share) as engine:
            replies.append(engine.generate(PROMPT, REPLY).token_ids)
            stats, cache = engine.stats, cache_of(engine)
            by_cpu.append(stats.computed_by_cpu)
            moved.append(stats.bytes_demanded)
            assert stats.computed_by_cpu <= stats.misses
            assert stats.bytes_demanded == (stats.misses - stats.computed_by_cpu) * engine.plan.record_nbytes
            assert stats.computed_by_cpu == stats.misses or share != "100%"
            cache.check_integrity()
            assert all(held.pins == 0 for held in cache._held.values())
            heat = cache._policy.heat()
            assert len(heat) >= min(stats.misses, cache.pool.count)
    assert replies[0] == replies[1] == replies[2]
    assert by_cpu[0] == 0 < by_cpu[1] < by_cpu[2]
    assert moved[0] > moved[1] > moved[2] == 0
    # Those that the CPU computed are known to the policy although they never had a slot.
    assert len(heat) > cache.pool.count


@pytest.mark.slow
def test_passes_of_many_tokens_are_left_to_the_card(zoo: Zoo, card: pytest.MonkeyPatch) -> None:
    prompt = list(range(5, 5 + MAX_TOKENS + 1))
    with loaded(zoo, "gated", 1.0) as engine:
        engine.generate(prompt, Sampling(temperature=0, max_tokens=1))
        assert engine.stats.computed_by_cpu == 0 < engine.stats.misses
        engine.generate(prompt[:MAX_TOKENS], Sampling(temperature=0, max_tokens=1, seed=1))
        assert engine.stats.computed_by_cpu > 0


def test_a_failure_of_the_cpu_ends_the_request_and_leaves_nothing_taken(zoo: Zoo, card: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise ArithmeticError("broken")

    with loaded(zoo, "gated", 0.5) as engine:
        expected = engine.generate(PROMPT, REPLY).token_ids
        released = list[bool]()
        with card.context() as broken:
            broken.setattr(HostExperts, "compute", fail)
            broken.setattr(cache_of(engine)._link, "released_all", lambda: released.append(True))
            with pytest.raises(EdgeMoEError, match="broken"):
                engine.generate([50, 60], REPLY)
        cache = cache_of(engine)
        assert released == [True]
        assert all(held.pins == 0 for held in cache._held.values())
        cache.check_integrity()
        assert engine.generate(PROMPT, REPLY).token_ids == expected


def test_the_link_moves_the_others_while_the_cpu_computes(zoo: Zoo, card: pytest.MonkeyPatch) -> None:
    events = list[str]()

    def noted(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def noting(*given: Any) -> Any:
            events.append(name)
            return call(*given)

        card.setattr(owner, name, noting)

    with loaded(zoo, "gated", 0.5) as engine:
        link = cache_of(engine)._link
        for owner, name in ((link, "start"), (link, "wait_any"), (HostExperts, "compute")):
            noted(owner, name)
        engine.generate(PROMPT, REPLY)
    places = [place for place, event in enumerate(events) if event == "compute"]
    assert places
    assert all(events[place - 1] == "start" for place in places)
    assert all(events[place + 1] == "wait_any" for place in places)


def test_padding_is_computed_nowhere(zoo: Zoo, card: pytest.MonkeyPatch) -> None:
    with loaded(zoo, "gated", 1.0) as engine, torch.inference_mode():
        assert engine._runtime is not None
        layer, tools = engine._runtime.layers.layers[0], engine._runtime._tools
        assert tools is not None
        hidden = torch.randn(4, engine._runtime.model.config.hidden_size)
        index, weights = torch.tensor([[11, 10, 9]] * 4), torch.full((4, 3), 0.5)
        before = engine.stats.computed_by_cpu
        with tools.padded(torch.tensor([1]), 1):
            found = layer.compute(hidden, index, weights)
        missing = engine.stats.computed_by_cpu - before
        assert 0 < missing <= 3
        assert not found[1:].any()
        (alone,) = layer.compute(hidden[:1], index[:1], weights[:1])
        assert (found[0] - alone).abs().max() <= ORDER * alone.abs().max()


def test_records_and_threads_are_given_back(zoo: Zoo, card: pytest.MonkeyPatch) -> None:
    """Records in RAM are read by nobody after a close, so that their memory is free."""
    others = set(threading.enumerate())
    engine = loaded(zoo, "gated", 1.0)
    assert engine._runtime is not None
    engine.generate(PROMPT, REPLY)
    layers = [layer._host for layer in engine._runtime.layers.layers]  # type: ignore[attr-defined]
    engine.close()
    assert all(each is not None and not each._kernels for each in layers)
    left = set(threading.enumerate()) - others
    assert not [each.name for each in left if each.name.startswith("edgemoe")]
