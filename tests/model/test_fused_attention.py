"""Attention modules as programs: the bits of the modules that they replace, and the modules that they leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from edgemoe.kernels import batch_invariant_linear, rms_norm
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.fused_attention import FusedAttention
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.sequential_runner import PassInput
from tests.support.checkpoints import Zoo, random_ids, running

FUSED = ["qwen3_moe", "mixtral", "qwen2_moe", "phimoe", "glm4_moe", "mellum", "aria_text"]
"""With norms of heads and without, with biases, partly rotated, and with windows in some layers."""
UNFUSED_LAYERS = ["phimoe"]
OTHERS = ["ernie4_5_moe", "exaone_moe", "olmoe", "gpt_oss", "afmoe"]
"""Interleaved rotation, none, norms of all heads, sinks, and gates."""
DTYPES = ["bfloat16", "float32"]


class Calls:
    """How often programs run, and whether they may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.allowed = True
        self.layers = 0
        run, run_layer, fits = FusedAttention.run, FusedAttention.run_layer, FusedAttention.fits

        def counted(fused: FusedAttention, *arguments: object) -> torch.Tensor:
            self.count += 1
            return run(fused, *arguments)  # type: ignore[arg-type]

        def counted_layer(fused: FusedAttention, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
            self.layers += 1
            return run_layer(fused, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(FusedAttention, "run", counted)
        monkeypatch.setattr(FusedAttention, "run_layer", counted_layer)
        monkeypatch.setattr(FusedAttention, "fits", lambda fused, *given: self.allowed and fits(fused, *given))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(batch_invariant_linear, "MIN_VALUES", 1)
    return Calls(monkeypatch)


@contextmanager
def runner_with_kernels(zoo: Zoo, family: str, dtype: str) -> Iterator[ModelRunner]:
    with running(zoo(family), 40, dtype=dtype) as own:
        batch_invariant_linear.install_gemv(own.model, KernelThreads(1))
        rms_norm.install_rms_norm(own.model)
        yield ModelRunner(own.runner())


def replies(runner: ModelRunner) -> list[torch.Tensor]:
    """Logits after a prompt, steps, a chain, a tree whose branch is kept, and a batch of sequences."""
    past, other = runner.start(200), runner.start(90)
    found = [runner.step(past, random_ids(30)), runner.step(other, random_ids(5, seed=3))]
    found += [runner.step(past, [token]) for token in random_ids(4, seed=1)]
    found += runner.run([PassInput(past, random_ids(9, seed=2), every=True)])
    tree, tokens = DraftTree(7), past.tokens
    branch = [0, tree.add(0, 11, 0.5)]
    branch.append(tree.add(branch[-1], 12, 0.5))
    tree.add(0, 13, 0.4)
    past.mark()
    found += runner.run([tree_input(past, tree, range(len(tree)), ())])
    past.rollback(tokens, branch)
    for number in range(40):
        found += runner.run([PassInput(past, [number]), PassInput(other, random_ids(2, seed=number), every=True)])
    # Longer than the program of a single token was made for, and another sequence's cache.
    found += [runner.step(each, [token]) for token in random_ids(4, seed=5) for each in (past, other)]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FUSED)
def test_the_bits_are_those_of_the_modules(family: str, dtype: str, zoo: Zoo, calls: Calls) -> None:
    with runner_with_kernels(zoo, family, dtype) as runner:
        calls.count = calls.layers = 0
        found = replies(runner)
        assert calls.count > 0
        # PhiMoE's norms are not RMS norms.
        assert (calls.layers > 0) == (family not in UNFUSED_LAYERS)
        calls.count, calls.layers, calls.allowed = 0, 0, False
        expected = replies(runner)
        assert calls.count == calls.layers == 0
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("family", OTHERS)
def test_other_modules_stay_as_they_are(family: str, zoo: Zoo, calls: Calls) -> None:
    with runner_with_kernels(zoo, family, "float32") as runner:
        calls.count = 0
        replies(runner)
        assert calls.count == 0


def test_long_passes_are_left_to_the_modules(zoo: Zoo, calls: Calls) -> None:
    with runner_with_kernels(zoo, "qwen3_moe", "bfloat16") as runner:
        past = runner.start(200)
        calls.count = 0
        runner.step(past, random_ids(65))
        assert calls.count == 0
        runner.step(past, random_ids(64))
        assert calls.count > 0
