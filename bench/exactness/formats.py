"""`formats`: what every packed format reads back, against its definition, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

from bench.measurement import BaseSize, Measurement
from bench.support.format_samples import Sample, same_bits, samples

NAME = "formats"
BAR = "equal bits (float32), whole and by rows"


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The matrices of each format."""

    rounds: int = 8


FULL, SMALL = Size(), Size(small=True, rounds=1)


def run(size: Size = FULL) -> Measurement:
    """Every format and variant, with other content each time."""
    wrong: list[str] = []
    names: set[str] = set()
    for seed in range(size.rounds):
        for sample in samples(seed):
            names.add(sample.name)
            wrong += [f"{sample.name}, round {seed}: {fault}" for fault in faults(sample)]
    value = {"formats": len(names), "wrong": wrong}
    return Measurement(NAME, value, BAR, not wrong, {"names": sorted(names), "rounds": size.rounds})


def faults(sample: Sample) -> list[str]:
    """What is wrong with one packed matrix."""
    expected = sample.expected()
    kind, rows = sample.format, sample.shape[0]
    found = []
    if not same_bits(kind.dequantize(sample.views, "w").contiguous(), expected):
        found.append("the whole matrix")
    middle = rows // 2 // kind.row_multiple * kind.row_multiple
    for first, last in ((0, middle), (middle, rows)):
        part = kind.rows(sample.views, "w", first, last).contiguous()
        if not same_bits(part, expected[first:last].contiguous()):
            found.append(f"rows {first} to {last}")
    return found
