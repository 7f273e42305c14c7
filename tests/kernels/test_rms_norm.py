"""RMS norms by one kernel: the arithmetic of each family, found by trying."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.kernels.rms_norm import MAX_VALUES, install_rms_norm

COLUMNS = 200


class _Norm(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        weight = 0.3 + torch.randn(COLUMNS, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(weight.to(dtype))
        self.variance_epsilon = 1e-6
        self.calls = 0

    def normalised(self, hidden_states: torch.Tensor) -> torch.Tensor:
        values = hidden_states.float()
        return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class LlamaRMSNorm(_Norm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.weight * self.normalised(hidden_states).to(hidden_states.dtype)


class GptRMSNorm(_Norm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (self.weight * self.normalised(hidden_states)).to(hidden_states.dtype)


class GemmaRMSNorm(_Norm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return ((1 + self.weight.float()) * self.normalised(hidden_states)).to(hidden_states.dtype)


class CentredRMSNorm(_Norm):
    """No RMS norm, whatever its name says."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.weight * self.normalised(hidden_states - hidden_states.mean(-1, keepdim=True))


class GatedRMSNorm(_Norm):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        # Raises AttributeError without a gate, as a family's does.
        return self.weight * self.normalised(hidden_states) * gate.sigmoid()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GptRMSNorm, GemmaRMSNorm])
def test_a_norm_has_the_values_of_its_family(kind: type[_Norm], dtype: torch.dtype) -> None:
    norm = kind(dtype)
    x = torch.randn(3, 7, COLUMNS, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.inference_mode():
        expected = norm(x)
        install_rms_norm(norm)
        norm.calls = 0
        found = norm(x)
        assert norm.calls == 0
        alone = torch.stack([norm(x[row, token]) for row in range(3) for token in range(7)])
    assert found.dtype is dtype
    assert torch.allclose(found.float(), expected.float(), rtol=1e-5 if dtype is torch.float32 else 1e-2)
    assert (found != expected).float().mean() < 0.01 or dtype is torch.float32
    assert torch.equal(found.view(21, COLUMNS), alone)


def test_strided_inputs_and_values_that_are_not_finite() -> None:
    norm = LlamaRMSNorm(torch.bfloat16)
    x = torch.randn(COLUMNS, 4, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16).t()
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    with torch.inference_mode():
        expected = norm(x)
        install_rms_norm(norm)
        assert torch.allclose(norm(x).float(), expected.float(), rtol=1e-2, equal_nan=True)


@pytest.mark.parametrize("kind", [CentredRMSNorm, GatedRMSNorm])
def test_what_only_has_the_name_keeps_its_forward(kind: type[_Norm]) -> None:
    norm = kind(torch.float32)
    install_rms_norm(norm)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize(
    "x", [torch.zeros(MAX_VALUES // COLUMNS + 1, COLUMNS), torch.zeros(2, COLUMNS).double(), torch.zeros(0, COLUMNS)]
)
def test_other_inputs_go_to_the_familys_own(x: torch.Tensor) -> None:
    norm = GptRMSNorm(torch.float32)
    with torch.inference_mode(), torch_threads(2):
        install_rms_norm(norm)
        norm.calls = 0
        assert norm(x).shape == x.shape
    assert norm.calls == 1


def test_on_one_thread_many_tokens_have_the_values_of_each_alone() -> None:
    norm = LlamaRMSNorm(torch.float32)
    install_rms_norm(norm)
    x = torch.randn(MAX_VALUES // COLUMNS + 1, COLUMNS, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode(), torch_threads(1):
        assert torch.equal(norm(x), torch.cat([norm(row) for row in x.split(1)]))
