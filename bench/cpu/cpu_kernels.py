"""`cpu-kernels`: how fast every format's kernels multiply, for few and many tokens, beside the memory's own speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bench.measurement import BaseSize, Measurement
from bench.support.decode_round import read_bandwidth
from edgemoe.cache.record import RecordLayout
from edgemoe.cache.slot_classes import SlotClass
from edgemoe.cache.slots import SlotPool
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.fp8_format import Fp8Format
from edgemoe.formats.gguf_format import GgufFormat
from edgemoe.formats.made import MADE, made_format
from edgemoe.formats.mxfp4_format import Mxfp4Format
from edgemoe.formats.nvfp4_format import Nvfp4Format
from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.cpu.arrays import Groups
from edgemoe.kernels.cpu.kernel_choice import widens
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, torch_threads

NAME = "cpu-kernels"
BAR = "none: the figures say which kernels wait for memory"
GGUF = ("Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
THREADS = 2
GROUPS = 8
"""Matrices of one call, as a layer's chosen experts."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The matrices, what is read before any of them is read again, and the numbers of tokens."""

    shape: tuple[int, int] = (1536, 2048)
    nbytes: int = 1 << 30
    tokens: tuple[int, ...] = (1, 2, 4, 8, 32)
    repeats: int = 9


FULL, SMALL = Size(), Size(small=True, shape=(32, 256), nbytes=1 << 18, tokens=(1, 5), repeats=1)


def run(size: Size = FULL) -> Measurement:
    """Formats one after the other, warm; medians. Two threads."""
    with torch_threads(THREADS):
        bandwidth = read_bandwidth(torch.ones(size.nbytes // 8, dtype=torch.int64))
    threads, table = KernelThreads(THREADS), {}
    with torch_threads(1):
        for kind in _formats(size.shape[1]):
            table[kind.name] = _measured(kind, threads, size, bandwidth)
            if not size.small:
                print(f"{kind.name:8} {table[kind.name]}", flush=True)
    threads.close()
    return Measurement(NAME, {"read_gb_per_second": round(bandwidth / 1e9, 1)}, BAR, None, table)


def _formats(columns: int) -> Iterator[WeightFormat]:
    yield FloatFormat(torch.bfloat16)
    yield from map(GgufFormat, GGUF)
    yield from (made_format(name, columns) for name in MADE)
    yield from (Mxfp4Format(), Nvfp4Format(divides=False), Fp8Format((128, 128)))


def _measured(kind: WeightFormat, threads: KernelThreads, size: Size, bandwidth: float) -> dict[str, object]:
    multiply, nbytes, records = _prepared(kind, threads, size)
    found: dict[str, list[float]] = {"GB/s": [], "of the memory's": [], "billion weights x tokens a second": []}
    for tokens in size.tokens:
        x = torch.randn(GROUPS * tokens, size.shape[1]).to(torch.bfloat16)
        starts, seconds = np.arange(GROUPS + 1) * tokens, []
        for turn in range(size.repeats + 1):
            slots = (np.arange(GROUPS) + turn * GROUPS) % records
            seconds.append(_seconds(partial(multiply, Groups(slots, starts), x)))
        speed = GROUPS * nbytes / statistics.median(seconds[1:])
        found["GB/s"].append(round(speed / 1e9, 1))
        found["of the memory's"].append(round(speed / bandwidth, 2))
        weights = size.shape[0] * size.shape[1] / nbytes
        found["billion weights x tokens a second"].append(round(speed * weights * tokens / 1e9, 1))
    return {"bits": round(8 * nbytes / (size.shape[0] * size.shape[1]), 2), "tokens": list(size.tokens), **found}


def _prepared(
    kind: WeightFormat, threads: KernelThreads, size: Size
) -> tuple[Callable[[Groups, torch.Tensor], object], int, int]:
    """The product of records of one matrix each, whose content is random; a matrix's bytes; and how many there are."""
    layout = RecordLayout([*kind.parts("w", size.shape)])
    records = max(2 * GROUPS, size.nbytes // layout.nbytes)
    memory = SlotPool([SlotClass(layout.nbytes, records)], torch.device("cpu")).regions[0].memory
    for name, view in layout.views(memory[0]).items():
        view.copy_(_content(name, view))
    memory[1:] = memory[0]
    if isinstance(kind, FloatFormat) and not widens(kind.dtype, size.shape[1]):
        matrix: SlotMatrix | PackedMatrix = SlotMatrix(kind.dtype, size.shape, memory)
    else:
        places = layout.places("w")
        matrix = PackedMatrix(kind, size.shape, memory, places)
    return lambda groups, x: matrix.multiply(threads, groups, x), layout.nbytes, records


def _content(name: str, view: torch.Tensor) -> torch.Tensor:
    """Random values for a part of a matrix. None leads to subnormal numbers, which are slow and rare in models."""
    generator = torch.Generator().manual_seed(len(name))
    if view.dtype.is_floating_point:
        scale = 100.0 if view.dtype.itemsize == 1 else 0.1
        return (scale * torch.randn(view.shape, generator=generator)).clamp(-400, 400).to(view.dtype)
    # Bytes of 32 to 63 are ordinary numbers where they are read as fp16; those of exponents alone begin at 2^-20.
    first, last = (107, 127) if name.endswith(".scale") else (32, 64)
    raw = torch.randint(first, last, (view.nbytes,), generator=generator, dtype=torch.uint8)
    return raw.view(view.dtype).view(view.shape)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
