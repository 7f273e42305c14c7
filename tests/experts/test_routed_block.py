"""MoE blocks as steps of their layer's program: the bits of their modules, and when they are left to these."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from edgemoe.cache import ExpertCache, ExpertId
from edgemoe.experts.routed_block import AfterAttention, RoutedBlock
from edgemoe.kernels import batch_invariant_linear, rms_norm
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.kernels.router import install_routers
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.sequential_runner import PassInput
from tests.support.checkpoints import Zoo, random_ids, running

FAMILIES = ["qwen3_moe", "mixtral", "mellum"]
SHARED = "qwen2_moe"
"""Beside its experts its blocks have one that every token uses."""
FEW = 12


class Calls:
    """Layers that were computed as a whole, and those whose program ended with the choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole = self.choosing = 0
        self.allowed = True
        output, fits = AfterAttention.output, RoutedBlock.fits

        def counted(following: AfterAttention, *given: torch.Tensor) -> torch.Tensor:
            self.whole += following.slots is not None
            self.choosing += following.slots is None
            return output(following, *given)

        monkeypatch.setattr(AfterAttention, "output", counted)
        monkeypatch.setattr(RoutedBlock, "fits", lambda block: self.allowed and fits(block))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(batch_invariant_linear, "MIN_VALUES", 1)
    return Calls(monkeypatch)


@contextmanager
def runner_with_kernels(
    zoo: Zoo, family: str, dtype: str, slots: int | None = None
) -> Iterator[tuple[ModelRunner, ExpertCache]]:
    """Without a number of `slots`, every expert is resident."""
    with running(zoo(family), slots, dtype=dtype) as own:
        batch_invariant_linear.install_gemv(own.model, KernelThreads(1))
        rms_norm.install_rms_norm(own.model)
        blocks = [(moe.block(own.model), moe.experts) for moe in own.blueprint.experts_modules]
        install_routers(blocks, KernelThreads(1), lambda: own.layers.routes_itself)
        if slots is None:
            load_all(own.cache)
        yield ModelRunner(own.runner()), own.cache


def load_all(cache: ExpertCache) -> None:
    experts = [ExpertId(layer, number) for layer, count in enumerate(cache.store.experts) for number in range(count)]
    cache.fill(experts)
    end = time.monotonic() + 20
    while not all(map(cache.is_resident, experts)):
        assert time.monotonic() < end
        time.sleep(0.001)


def replies(runner: ModelRunner) -> list[torch.Tensor]:
    """Logits after a prompt, steps of two sequences, and passes of several tokens in between."""
    past, other = runner.start(120), runner.start(60)
    found = [runner.step(past, random_ids(30)), runner.step(other, random_ids(5, seed=3))]
    for number in range(12):
        found += [runner.step(past, [number]), runner.step(other, [number + 1])]
        found += runner.run([PassInput(past, random_ids(3, seed=number), every=True)])
    return found


@pytest.mark.parametrize("slots", [None, FEW])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_are_those_of_the_modules(family: str, dtype: str, slots: int | None, zoo: Zoo, calls: Calls) -> None:
    with runner_with_kernels(zoo, family, dtype, slots) as (runner, cache):
        found, counted = replies(runner), cache.counters.copy()
        # Passes of several tokens end with the choice everywhere.
        assert (calls.whole > 0, calls.choosing > 0) == (slots is None, True)
        calls.whole, calls.choosing, calls.allowed = 0, 0, False
        expected = replies(runner)
        assert calls.whole == calls.choosing == 0
        if slots is None:
            assert cache.counters.hits == 2 * counted.hits
            assert cache.counters.misses == counted.misses == 0
    assert all(map(torch.equal, found, expected))


def test_a_pass_alone_has_the_bits_of_a_pass_of_several(zoo: Zoo, calls: Calls) -> None:
    """Of single tokens the router is a part of the program, of several it is a module."""
    with runner_with_kernels(zoo, "qwen3_moe", "bfloat16") as (runner, _):
        past, other = runner.start(60), runner.start(60)
        for each in (past, other):
            runner.step(each, random_ids(9))
        tokens = random_ids(8, seed=4)
        together = runner.run([PassInput(past, tokens, every=True)])[0]
        alone = torch.stack([runner.step(other, [token]) for token in tokens])
        assert calls.whole > 0
    assert torch.equal(together, alone)


def test_blocks_with_other_parts_are_left_alone(zoo: Zoo, calls: Calls) -> None:
    with runner_with_kernels(zoo, SHARED, "bfloat16") as (runner, _):
        replies(runner)
    assert calls.whole == calls.choosing == 0


def test_layers_that_are_silent_do_not_compute(zoo: Zoo, calls: Calls) -> None:
    with runner_with_kernels(zoo, "qwen3_moe", "bfloat16") as (runner, cache):
        with runner.sequential.layers.silenced():
            runner.step(runner.start(9), [3])
        assert calls.whole == calls.choosing == 0
        assert cache.counters.hits == 0
