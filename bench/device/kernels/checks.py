"""The kernels of experts and of attention on a card against their plain forms on the CPU, in several processes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from bench.device.processes import in_processes
from bench.device.section import Found, SkippedError, Target
from edgemoe.kernels.triton.availability import missing

TOKENS, SMALL_TOKENS = (1, 5, 17, 64), (1, 2)
PROCESSES = 14
TIMEOUT = 75.0
FIRST = ("bf16", "mxfp4", "GGUF Q4_K", "int4 group 32", "GGUF Q8_0", "fp8 (128", "bitsandbytes nf4", "fp32")
"""How the names of those formats begin that are tried first: the time may not be enough for all."""
SHAPE = "shape of Qwen3-30B-A3B"
OUTER, INNER = 2048, 768
"""The sizes of its experts."""
ATTENTION = "attention: "
SMALL_TASKS = ("mxfp4", f"{ATTENTION}shared keys")


def measure(target: Target) -> Found:
    """The numbers of formats and of kinds of attention that were tried, and what is wrong with them."""
    if reason := missing():
        raise SkippedError(reason)
    tasks = list(SMALL_TASKS) if target.small else _tasks()
    found = in_processes(__name__, target, tasks, PROCESSES, TIMEOUT)
    unavailable = {task: each["unavailable"] for task, each in found.items() if "unavailable" in each}
    tried = {task: each for task, each in found.items() if task not in unavailable}
    errors = [each["largest_error"] for each in tried.values() if "largest_error" in each]
    figures = {
        "formats": sum(not task.startswith((ATTENTION, SHAPE)) for task in tried),
        "kinds_of_attention": sum(task.startswith(ATTENTION) for task in tried),
        "cases": sum(each.get("cases", 0) for each in tried.values()),
        "largest_error": float(f"{max(errors, default=0.0):.1e}"),
        "unavailable": unavailable,
        "not_reached": [task for task in tasks if task not in found],
    }
    faults = [f"{task}: {fault}" for task, each in tried.items() for fault in each.get("faults", [])]
    return Found(figures, faults + [f"{task}: {each['error']}" for task, each in tried.items() if "error" in each])


def _tasks() -> list[str]:
    """The names of all formats, those of `FIRST` before the others, and of the kinds of attention."""
    from bench.no_card.device_kernels import formats

    names = sorted({name for name, _, _ in formats()}, key=lambda name: (not name.startswith(FIRST), name))
    return [f"{SHAPE}, {name}" for name in published()] + [f"{ATTENTION}{name}" for name in _shapes()] + names


def published() -> dict[str, Any]:
    """Formats that experts of this shape are published in or quantised to."""
    from edgemoe.formats.float_format import FloatFormat
    from edgemoe.formats.gguf_format import GgufFormat
    from edgemoe.formats.made import made_format
    from edgemoe.formats.mxfp4_format import Mxfp4Format

    return {
        "bf16": FloatFormat(torch.bfloat16),
        "int4": made_format("int4", OUTER),
        "Q4_K": GgufFormat("Q4_K"),
        "mxfp4": Mxfp4Format(),
    }


def _shapes() -> list[str]:
    """The kinds of attention of the kernel's test; none where pytest is missing."""
    try:
        from tests.kernels.triton.test_attention import SHAPES
    except ImportError:
        return []
    return list(SHAPES)


def found(task: str, device: str, small: bool) -> dict[str, Any]:
    """What is wrong with one format, at the sizes of tests or of a published model, or with one kind of attention."""
    from bench.support.no_card.quick_interpreter import quick_interpreter

    card = torch.device(device)
    with quick_interpreter() if card.type == "cpu" else nullcontext():
        try:
            if task.startswith(ATTENTION):
                return _attention(task.removeprefix(ATTENTION), card)
            if task.startswith(SHAPE):
                return _published_shape(task.removeprefix(f"{SHAPE}, "), card)
            return _format(task, card, small=small)
        except ImportError as error:
            # The tables of GGUF's IQ types come with a package that may be missing.
            return {"unavailable": repr(error)}


def _format(name: str, card: torch.device, *, small: bool) -> dict[str, Any]:
    """Every layout in float32; and in 16 bits, which only a card rounds as PyTorch does."""
    from bench.device.kernels.card_case import CardCase, half_cases, half_faults
    from bench.no_card.device_kernels import cases, faults_of, formats
    from edgemoe.formats.float_format import FloatFormat
    from edgemoe.kernels.triton.grouped_ffn import GroupedMatrix

    kind, columns = next((kind, columns) for own, kind, columns in formats() if own == name)
    if not GroupedMatrix.fits(kind, (48, columns)):
        return {"unavailable": "no kernel reads it"}
    tokens, faults, worst, count = SMALL_TOKENS if small else TOKENS, [], 0.0, 0
    for case in cases(kind, columns):
        error, wrong = faults_of(CardCase(case, card), tokens, tokens)
        faults += [f"{case.layout.name}: {fault}" for fault in wrong]
        worst, count = max(worst, error), count + 1
        if small:
            return {"cases": count, "largest_error": worst, "faults": faults}
    dtype = kind.dtype if isinstance(kind, FloatFormat) and kind.dtype.itemsize == 2 else torch.bfloat16
    if kind != FloatFormat(torch.float32):
        for half in half_cases(kind, columns, card):
            faults += half_faults(half, dtype, tokens)
            count += 1
    return {"cases": count, "largest_error": worst, "faults": faults}


def _published_shape(name: str, card: torch.device) -> dict[str, Any]:
    from bench.device.kernels.card_case import CardCase, half_faults
    from bench.no_card.device_kernels import LAYOUTS, Case

    kind = published()[name]
    case = CardCase(Case(kind, kind, OUTER, INNER, LAYOUTS[0]), card)
    return {"cases": 1, "faults": half_faults(case, torch.bfloat16, TOKENS)}


def _attention(name: str, card: torch.device) -> dict[str, Any]:
    """Values against softmax in float64, a token's bits alone and among others, and the rows that are appended."""
    from bench.device.kernels.card_case import attended
    from tests.kernels.triton import test_attention as own

    shape, faults, worst = own.SHAPES[name], [], 0.0
    place = own.LAYERS, own.LAYER, own.CONTEXT
    for sinks in (None, torch.tensor([0.5, -1.0, 3.0, 12.0, 0.0, -40.0])[: shape.heads]):
        sequences = [
            own.Cached(shape, 1, base=0, seen=own.causal(1), capacity=5),
            own.Cached(shape, 3, base=530, seen=own.causal(2), capacity=600),
            own.Cached(shape, 5, base=254, seen=own.TREE, capacity=300),
        ]
        output = attended(shape.attention(), sequences, *place, 16, sinks, card)
        expected = torch.cat([own.plain(shape, each, sinks) for each in sequences])
        difference = (output[: len(expected)] - expected).abs().max()
        worst = max(worst, float(difference))
        if not difference <= 2e-5 * max(1.0, float(expected.abs().max())):
            faults.append(f"values differ by {float(difference):.1e}")
        if output[len(expected) :].any():
            faults.append("padding gets values")
        single = own.Cached(shape, 3, base=530, seen=own.causal(2), capacity=600)
        alone = attended(shape.attention(), [single], *place, 2, sinks, card)
        if not torch.equal(alone, output[1:3]):
            faults.append("tokens alone get other bits than among others")
        for each in sequences:
            for made, right in zip(each.layers, each.expected_buffers(), strict=True):
                if not (torch.equal(made.keys.cpu(), right[0]) and torch.equal(made.values.cpu(), right[1])):
                    faults.append(f"rows of a sequence of {each.base} tokens are not appended as they should be")
    return {"cases": 2, "largest_error": worst, "faults": faults}
