"""Packed formats on the device: the values of the CPU, and tokens of packed checkpoints as transformers' there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.device.section import Found, Target
from bench.exactness.native_exact import compare
from bench.support.format_samples import same_bits, samples
from bench.support.zoo import make
from edgemoe import Engine, Sampling
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
    figures: dict[str, Any] = {"formats": len(names), "checkpoints": {}, "on both devices": {}}
    for family, packing in CASES[:1] if target.small else CASES:
        with tempfile.TemporaryDirectory(prefix="edgemoe-packed-") as folder, quiet_transformers():
            found_here = compare(Path(folder), family, packing, 6 if target.small else 32, target.device)
        figures["checkpoints"][f"{family} {packing}"] = found_here
        if not found_here["same"] or found_here["logprob"] > 1e-4:
            faults.append(f"{family} in {packing}: {found_here}")
    for name, model, settings in _models(target.small):
        with tempfile.TemporaryDirectory(prefix="edgemoe-packed-") as folder:
            try:
                path = model(Path(folder))
            except ImportError:
                continue
            here, there = (_reply(path, device, settings) for device in (target.device, "cpu"))
        figures["on both devices"][name] = here == there
        if here != there:
            faults.append(f"{name}: other tokens than on the CPU")
    return Found(figures, faults)


def _models(small: bool) -> Iterator[tuple[str, Callable[[Path], Path], dict[str, Any]]]:
    """Names, what makes a checkpoint in a folder, and settings: GGUF files, and weights that edgemoe quantises."""

    def gguf(family: str, experts: str, dense: str) -> Callable[[Path], Path]:
        def make_file(folder: Path) -> Path:
            from gguf import GGMLQuantizationType

            from bench.support.gguf_files import GgufMaker

            kinds = GGMLQuantizationType[experts], GGMLQuantizationType[dense]
            return GgufMaker.of_zoo(family, folder).write(folder / "model.gguf", *kinds)

        return make_file

    for family, experts, dense in (
        ("qwen3_moe", "Q4_0", "Q8_0"),
        ("mixtral", "Q8_0", "Q5_0"),
        ("gpt_oss", "Q8_0", "F16"),
    ):
        yield f"{family} {experts} {dense}", gguf(family, experts, dense), {}
    for experts, dense in (("nf4", "int8"), ("int4", "nf4"), ("int8", "native")):
        yield (
            f"quantised {experts} {dense}",
            lambda folder: make("qwen3_moe", folder),
            {"experts": experts, "dense": dense},
        )
        if small:
            return


def _reply(model: Path, device: str, settings: Mapping[str, Any]) -> tuple[int, ...]:
    sampling = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
    with Engine.load(
        model, device=device, dtype="float32", state_folder="none", expert_cache="40%", **settings
    ) as engine:
        return engine.generate([5, 60, 70, 80, 9], sampling).token_ids
