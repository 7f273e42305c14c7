"""Packed formats on the device: the values of the CPU, and tokens of packed checkpoints as transformers' there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench.device.section import Found, Target
from bench.exactness.native_exact import compare
from bench.support.format_samples import same_bits, samples
from edgemoe.quiet import quiet_transformers

CASES = (
    ("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8"), ("qwen3_moe", "compressed int4 actorder"),
    ("mixtral", "compressed nvfp4"), ("qwen3_moe", "gptq desc_act"), ("mixtral", "awq"),
    ("qwen3_moe", "bitsandbytes nf4 nested"), ("olmoe", "bitsandbytes int8"),
)  # fmt: skip


def measure(target: Target) -> Found:
    """What differs between the devices, and which checkpoints give other tokens."""
    faults: list[str] = []
    names: list[str] = []
    for sample in samples(1):
        on_device = {name: part.to(target.device) for name, part in sample.views.items()}
        try:
            found = sample.format.dequantize(on_device, "w").cpu().contiguous()
        except ImportError:
            # The tables of GGUF's IQ types come with a package that may be missing.
            continue
        names.append(sample.name)
        if not same_bits(found, sample.format.dequantize(sample.views, "w").contiguous()):
            faults.append(f"{sample.name} has other values on the device")
    figures: dict[str, Any] = {"formats": len(names), "checkpoints": {}}
    for family, packing in CASES[:1] if target.small else CASES:
        with tempfile.TemporaryDirectory(prefix="edgemoe-packed-") as folder, quiet_transformers():
            found_here = compare(Path(folder), family, packing, 6 if target.small else 32, target.device)
        figures["checkpoints"][f"{family} {packing}"] = found_here
        if not found_here["same"] or found_here["logprob"] > 1e-4:
            faults.append(f"{family} in {packing}: {found_here}")
    return Found(figures, faults)
