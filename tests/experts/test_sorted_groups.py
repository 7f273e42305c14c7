"""The pairs of a pass, sorted on a device: the same results, and one read of the device by the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from edgemoe.cache import Part, RecordLayout, SlotClass, SlotPool
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.experts.expert_ffn import PlainExperts, SortedGroups, TokenGroups
from edgemoe.formats.float_format import FloatFormat

EXPERTS, WIDTH, INNER, TOP_K = 6, 8, 4, 3
LAYOUT = RecordLayout(
    [Part("up_proj", (INNER, WIDTH), torch.float32), Part("down_proj", (WIDTH, INNER), torch.float32)]
)
FORMATS = {name: FloatFormat(torch.float32) for name in ("up_proj", "down_proj")}
MOE = ExpertsModule("experts", EXPERTS, LAYOUT, FORMATS, {part.name: part.shape for part in LAYOUT.parts})
MODULE: Any = SimpleNamespace(has_gate=False, has_bias=False, is_transposed=False, act_fn=F.relu)


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, choices of which some name no expert, and weights of which some are 0."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS + 2, generator=generator)[:TOP_K] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP_K, generator=generator)
    return hidden, index, weights.masked_fill(weights < 0.2, 0)


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_results_are_those_of_the_plain_groups(tokens: int) -> None:
    with SlotPool([SlotClass(LAYOUT.nbytes, EXPERTS)], torch.device("cpu")) as pool:
        pool.memory.view(torch.float32).normal_(generator=torch.Generator().manual_seed(0))
        experts = PlainExperts(MODULE, MOE, pool.region(LAYOUT.nbytes))
        results = []
        for make in (TokenGroups, SortedGroups):
            groups = make(*inputs(tokens), EXPERTS)
            wanted = groups.wanted
            for start in range(0, len(wanted), 2):
                experts.compute(groups, wanted[start : start + 2], wanted[start : start + 2])
            results.append(groups.complete())
        assert torch.allclose(results[0], results[1], atol=1e-6)
        assert (results[0] != 0).any()


class KnownGroups(SortedGroups):
    """On a device that cannot be read: the choices are known beforehand, and reads are counted."""

    choices: list[int]
    reads = 0

    def _on_host(self, chosen: torch.Tensor) -> list[int]:
        KnownGroups.reads += 1
        self._below = sum(each < 0 for each in self.choices)
        return self.choices


def test_the_host_reads_the_choices_and_nothing_else() -> None:
    """A fake CUDA tensor raises where its values are read, and where it is indexed by a list."""
    hidden, index, weights = inputs(5)
    KnownGroups.choices = index.masked_fill(weights == 0, -1).flatten().tolist()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = [torch.empty_like(each, device="cuda") for each in (hidden, index, weights)]
        groups = KnownGroups(fake[0], fake[1], fake[2], EXPERTS)
        region: Any = SimpleNamespace(
            views=lambda slot, layout: {
                "up_proj": torch.empty(INNER, WIDTH, device="cuda"),
                "down_proj": torch.empty(WIDTH, INNER, device="cuda"),
            }
        )
        PlainExperts(MODULE, MOE, region).compute(groups, groups.wanted, groups.wanted)
        result = groups.complete()
    assert result.device.type == "cuda"
    assert tuple(result.shape) == (5 * TOP_K, WIDTH)
    assert KnownGroups.reads == 1
