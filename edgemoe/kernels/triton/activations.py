"""The activation between the two matrices of an expert: which one a module of transformers has, and its kernel form."""

# Triton reads the annotations of a kernel as part of it: only what is fixed when it is compiled has one.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from edgemoe.kernels.triton.grouped_kernels import rounded
from edgemoe.kernels.triton.language import constexpr, tl, triton

PROBES = 512
"""Random values that an activation is recognised by."""
ALPHAS, LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")
"""What families call the constants of their gates."""


class GateRule(NamedTuple):
    """What lies between the two matrices of an expert."""

    activation: str
    """One of `PLAIN` or `WHOLE`."""
    gated: bool
    """Whether there is a gate: the first matrix then gives two values, gate and up, for each that the second takes."""
    interleaved: bool = False
    """Whether gate and up alternate; if not, the gate is the first half."""
    constants: tuple[float, ...] = ()


def gate_rule(module: Any) -> GateRule | None:
    """What an experts module of transformers computes between its matrices; None if it is nothing that has a kernel.

    Found by comparing what the module itself gives for random values, in float32 and, bit for bit, in bfloat16, whose
    values show where it rounds. Reads the device once, so it must not be called while tensors are fake.
    """
    own: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate if module.has_gate else module.act_fn
    values = _probe(module)
    found = {dtype: own(values.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    return next((rule for rule in _candidates(module) if _agrees(rule, values, found)), None)


def plain_activation(rule: GateRule, values: torch.Tensor) -> torch.Tensor:
    """The reference: `values` are [..., outputs of the first matrix], rounded after each operation."""
    if not rule.gated:
        return PLAIN[rule.activation][0](values)
    gate, up = (values[..., ::2], values[..., 1::2]) if rule.interleaved else values.chunk(2, dim=-1)
    if rule.activation in WHOLE:
        return WHOLE[rule.activation][0](gate, up, *rule.constants)
    return PLAIN[rule.activation][0](gate) * up


def activation_kernel(rule: GateRule) -> tuple[Any, bool]:
    """The function that kernels call for `rule`, and whether it takes gate and up: see `grouped_kernels.activated`."""
    if rule.activation in WHOLE:
        return WHOLE[rule.activation][1], True
    return PLAIN[rule.activation][1], False


def _probe(module: Any) -> torch.Tensor:
    """Random values, some of which are beyond the module's limits, on the device of its activation."""
    act_fn = getattr(module, "act_fn", None)
    held = itertools.chain(act_fn.parameters(), act_fn.buffers()) if isinstance(act_fn, nn.Module) else ()
    device = next((tensor.device for tensor in held), torch.device("cpu"))
    values = 2 * torch.randn(4, PROBES, generator=torch.Generator().manual_seed(0))
    values[1:3] *= max([1.0, *(limit for limit in _constants(module, LIMITS))])
    return values.to(device)


def _constants(module: Any, names: tuple[str, ...]) -> list[float]:
    values = [getattr(module, name, None) for name in names]
    return [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]


def _candidates(module: Any) -> Iterator[GateRule]:
    if not module.has_gate:
        yield from (GateRule(name, False) for name in PLAIN)
        return
    limits = [(limit,) for limit in _constants(module, LIMITS)]
    both = list(itertools.product(_constants(module, ALPHAS), _constants(module, LIMITS)))
    known: dict[str, list[Any]] = {"swiglu": both, "clamped_silu": limits, "silu_clamped": limits}
    for interleaved in (False, True):
        yield from (GateRule(name, True, interleaved) for name in PLAIN)
        for name in WHOLE:
            yield from (GateRule(name, True, interleaved, constants) for constants in known.get(name, [()]))


def _agrees(rule: GateRule, values: torch.Tensor, found: dict[torch.dtype, torch.Tensor]) -> bool:
    if found[torch.float32].shape[-1] != (values.shape[-1] // 2 if rule.gated else values.shape[-1]):
        return False
    close = torch.allclose(plain_activation(rule, values), found[torch.float32], rtol=1e-5, atol=1e-6)
    return close and torch.equal(plain_activation(rule, values.bfloat16()), found[torch.bfloat16])


# --- the kernels' forms: float32 values, the last operation of a plain one not yet rounded -------


def _silu(x):
    return x / (1.0 + tl.exp(-x))


def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


def _gelu_tanh(x):
    # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2y)).
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


def _relu(x):
    # Not by `maximum`, which may give 0 for what is no number.
    return tl.where(x < 0.0, 0.0, x)


def _relu_squared(x):
    x = tl.where(x < 0.0, 0.0, x)
    return x * x


def _at_most(x, limit: constexpr):
    return tl.where(x > limit, limit, x)


def _within(x, limit: constexpr):
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


silu = triton.jit(_silu)
at_most = triton.jit(_at_most)
within = triton.jit(_within)


def _swiglu(gate, up, CONSTANTS: constexpr, KIND: constexpr):
    gate, up = at_most(gate, CONSTANTS[1]), within(up, CONSTANTS[1])
    swish = rounded(gate * rounded(1.0 / (1.0 + tl.exp(-rounded(gate * CONSTANTS[0], KIND))), KIND), KIND)
    return rounded(rounded(up + 1.0, KIND) * swish, KIND)


def _clamped_silu(gate, up, CONSTANTS: constexpr, KIND: constexpr):
    return rounded(rounded(silu(at_most(gate, CONSTANTS[0])), KIND) * within(up, CONSTANTS[0]), KIND)


def _silu_clamped(gate, up, CONSTANTS: constexpr, KIND: constexpr):
    return rounded(at_most(rounded(silu(gate), KIND), CONSTANTS[0]) * within(up, CONSTANTS[0]), KIND)


def _wide_silu(gate, up, CONSTANTS: constexpr, KIND: constexpr):
    return rounded(silu(gate) * up, KIND)


def _plain_swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _plain_clamped_silu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


def _plain_silu_clamped(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)


def _plain_wide_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


PLAIN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Any]] = {
    "silu": (F.silu, silu),
    "gelu": (F.gelu, triton.jit(_gelu)),
    "gelu_pytorch_tanh": (lambda x: F.gelu(x, approximate="tanh"), triton.jit(_gelu_tanh)),
    "relu": (F.relu, triton.jit(_relu)),
    "relu2": (lambda x: F.relu(x).square(), triton.jit(_relu_squared)),
}
"""Activations of one value, which a gate multiplies by up, in PyTorch and in a kernel."""
WHOLE: dict[str, tuple[Callable[..., torch.Tensor], Any]] = {
    "swiglu": (_plain_swiglu, triton.jit(_swiglu)),
    "clamped_silu": (_plain_clamped_silu, triton.jit(_clamped_silu)),
    "silu_clamped": (_plain_silu_clamped, triton.jit(_silu_clamped)),
    "wide_silu": (_plain_wide_silu, triton.jit(_wide_silu)),
}
"""Gates that are no product of an activation and up; their constants are alpha and the limit, or the limit."""
