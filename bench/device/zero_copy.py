"""Records fetched by a kernel, straight from page-locked RAM, instead of by the card's copy engine."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.device.section import Found, Target
from bench.device.timing import MIB, device_ms, synchronize
from bench.device.triton_import import kernels

RECORDS = 8
PROGRAMS = (2, 8, 32)
"""Programs that share one record."""


def measure(target: Target) -> Found:
    """GB/s by the number of programs, and whether the records arrived as they were."""
    gather = kernels().gather
    device = torch.device(target.device)
    nbytes = 16 << 10 if target.small else 9 * MIB
    sources = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=target.cuda).random_(0, 256) for _ in range(RECORDS)]
    records = torch.zeros(RECORDS, nbytes, dtype=torch.uint8, device=device)
    addresses = torch.tensor([each.data_ptr() for each in sources], device=device)
    order = torch.arange(RECORDS, dtype=torch.int32, device=device)
    slots = order.flip(0).contiguous()
    figures: dict[str, Any] = {}

    def fetch(programs: int) -> None:
        settings = {"words": nbytes // 8, "block": 1024, "programs": programs, "num_warps": 8}
        gather[(RECORDS, programs)](addresses, records.view(torch.int64), order, slots, **settings)

    for programs in PROGRAMS:
        fetch(programs)
        synchronize()
        if target.cuda:
            taken = min(device_ms(partial(fetch, programs)) for _ in range(3))
            figures[f"GBps with {RECORDS * programs} programs"] = round(RECORDS * nbytes / taken / 1e6, 1)
    arrived = records.cpu().flip(0)
    figures["right"] = all(torch.equal(record, source) for record, source in zip(arrived, sources, strict=True))
    return Found(figures, [] if figures["right"] else ["records that a kernel fetched are not what they were"])
