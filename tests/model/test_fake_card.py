"""A whole step of every family with tensors of a card that have no values: nothing is mixed up, nothing is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from bench.support import zoo
from bench.support.no_card.fake_card import DEVICE, Counts, FakeCard, put_on
from bench.support.no_card.fake_passes import FakePasses, without_weights
from edgemoe.quiet import quiet_transformers

pytest.importorskip("triton")

CONTEXT = 512
OWN_WAITS = {"phimoe": 1}
"""Waits of a pass that transformers' own code of a family has: it makes a tensor of a number (LongRoPE's factor)."""
OWN_READS = {"qwen4_exp", "qwen4_exp_text"}
"""Families whose forward in transformers needs values of the device, which fake tensors do not have."""
MAX_LAUNCHES = 12
"""A layer, outside of graphs, of a pass that is captured."""


@contextmanager
def passes_of(family: str, share: float = 0.6) -> Iterator[tuple[FakePasses, int]]:
    """Passes of the tiny `family` with a slot for a `share` of the experts, and the number of its MoE layers."""
    import transformers

    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    with quiet_transformers():
        model, modules = without_weights(zoo.config(family))
    card, choices = FakeCard(), random.Random(1)
    least = min(moe.experts for moe in modules)
    slots = max(3 * len(modules), round(share * sum(moe.experts for moe in modules)))

    def chosen(pairs: int) -> list[int]:
        return [choices.randrange(least) for _ in range(pairs)]

    card.chosen = chosen
    with quiet_transformers(), card.running():
        yield FakePasses(card, put_on(card, model, modules, slots), CONTEXT), len(modules)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(zoo.TESTED) - OWN_READS))
def test_a_step_reads_nothing_but_the_choices(family: str) -> None:
    with passes_of(family) as (passes, layers):
        # transformers' own KV caches begin with copies of empty lists.
        assert passes.prompt(12).choices <= layers
        # New sequences; one after the other where they do not share a pass.
        assert passes.together(2).choices <= 2 * layers
        steps: list[Callable[[], Counts]] = [passes.decode]
        if passes.verifies:
            steps += [passes.verify, passes.draft] if passes.has_kernels else [passes.verify]
        for step in steps:
            found = step()
            assert found.choices <= layers
            assert found.host_reads - found.choices <= OWN_WAITS.get(family, 0)
        if passes.refusal:
            assert "captur" in passes.refusal or "share" in passes.refusal or "state" in passes.refusal
        else:
            assert passes.decode().launches <= MAX_LAUNCHES * layers


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(OWN_READS))
def test_what_else_is_read_is_read_by_transformers(family: str) -> None:
    unreadable = (DataDependentOutputException, DynamicOutputShapeException)
    with passes_of(family) as (passes, _), pytest.raises(unreadable) as raised:
        passes.prompt(12)
    places = [str(entry.path) for entry in raised.traceback if "torch" not in Path(str(entry.path)).parts]
    last = [place for place in places if "fake_card" not in place][-1]
    assert "transformers" in Path(last).parts
    assert "models" in Path(last).parts


def test_drafts_are_one_graph() -> None:
    with passes_of("qwen3_moe") as (passes, _):
        passes.prompt(12)
        passes.draft()
        found = passes.draft()
        assert (found.launches, found.host_reads) == (1, 0)


def test_hits_of_a_complete_cache_need_no_host() -> None:
    with passes_of("qwen3_moe", share=1.0) as (passes, _):
        passes.prompt(12)
        passes.decode()
        found = passes.decode()
        assert (found.launches, found.host_reads) == (1, 0)


@pytest.mark.parametrize("fault", ["mixed", "item", "list"])
def test_the_card_finds_faults(fault: str) -> None:
    """What the tests above would miss if the fake card missed it."""
    card = FakeCard()
    with card.running():
        own = torch.empty(4, 4, device=DEVICE)
        if fault == "mixed":
            with pytest.raises(RuntimeError, match="device"):
                own @ torch.ones(4, 4)
        elif fault == "item":
            with pytest.raises(RuntimeError):
                card.counted(lambda: bool(own.sum() > 0))
            assert card.counts.host_reads == 1
        else:
            assert card.counted(lambda: torch.tensor([1, 2], device=DEVICE)).host_reads == 1
