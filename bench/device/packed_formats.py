"""Packed formats on the device: the values of the CPU, and tokens of packed checkpoints as transformers' there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.device.processes import in_processes
from bench.device.section import Found, Target
from edgemoe import Engine, Sampling
from edgemoe.quiet import quiet_transformers

CASES = (
    ("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8"), ("qwen3_moe", "compressed int4 actorder"),
    ("mixtral", "compressed nvfp4"), ("qwen3_moe", "gptq desc_act"), ("mixtral", "awq"),
    ("qwen3_moe", "bitsandbytes nf4 nested"), ("olmoe", "bitsandbytes int8"),
)  # fmt: skip
"""Families and packings that are compared with transformers."""
GGUF = (("qwen3_moe", "Q4_0", "Q8_0"), ("mixtral", "Q8_0", "Q5_0"), ("gpt_oss", "Q8_0", "F16"))
"""Families and types of experts and of other matrices, in GGUF files, that are compared with the CPU."""
MADE = (("nf4", "int8"), ("int4", "nf4"), ("int8", "native"))
"""What edgemoe quantises experts and other matrices to, compared with the CPU."""
VALUES = "values"
PROCESSES = 7
TIMEOUT = 90.0
LOGPROB = 1e-4
"""Largest difference of a log-probability."""


def measure(target: Target) -> Found:
    """What differs between the devices, and which checkpoints give other tokens."""
    packed, gguf, made = (CASES[:1], GGUF[:1], ()) if target.small else (CASES, GGUF, MADE)
    checkpoints = [f"{family} {packing}" for family, packing in packed]
    devices = [" ".join(each) for each in gguf] + [f"quantised {' '.join(each)}" for each in made]
    found = in_processes(__name__, target, [VALUES, *checkpoints, *devices], PROCESSES, TIMEOUT)
    figures: dict[str, Any] = {
        "formats": found.get(VALUES, {}).get("formats"),
        "checkpoints": {task: found[task] for task in checkpoints if task in found},
        "on both devices": {task: found[task].get("same") for task in devices if task in found},
    }
    faults = [f"{task}: {each['error']}" for task, each in found.items() if "error" in each]
    faults += [f"{name} has other values on the device" for name in found.get(VALUES, {}).get("wrong", ())]
    faults += [f"{task}: {each}" for task, each in found.items() if "logprob" in each and not _right(each)]
    faults += [f"{task}: other tokens than on the CPU" for task in devices if found.get(task, {}).get("same") is False]
    tasks = [VALUES, *checkpoints, *devices]
    return Found(figures, faults + [f"{task} was not reached" for task in tasks if task not in found])


def _right(compared: Mapping[str, Any]) -> bool:
    """Whether a checkpoint gave transformers' tokens."""
    return bool(compared["same"]) and compared["logprob"] <= LOGPROB


def found(task: str, device: str, small: bool) -> dict[str, Any]:
    """The values of all formats, or one checkpoint against transformers, or on both devices."""
    if task == VALUES:
        return _values(device)
    family, _, packing = task.partition(" ")
    with tempfile.TemporaryDirectory(prefix="edgemoe-packed-") as name:
        folder = Path(name)
        if (family, packing) in CASES:
            from bench.exactness.native_exact import compare

            with quiet_transformers():
                return compare(folder, family, packing, 6 if small else 32, device)
        try:
            make, settings = _checkpoint(family, *packing.split())
            path = make(folder)
        except ImportError as error:
            return {"unavailable": repr(error)}
        return {"same": _reply(path, device, settings) == _reply(path, "cpu", settings)}


def _values(device: str) -> dict[str, Any]:
    """The formats whose values on `device` are not those of the CPU."""
    from bench.support.format_samples import same_bits, samples

    wrong, count = [], 0
    for sample in samples(1):
        on_device = {name: part.to(torch.device(device)) for name, part in sample.views.items()}
        try:
            values = sample.format.dequantize(on_device, "w").cpu().contiguous()
        except ImportError:
            # The tables of GGUF's IQ types come with a package that may be missing.
            continue
        count += 1
        if not same_bits(values, sample.format.dequantize(sample.views, "w").contiguous()):
            wrong.append(sample.name)
    return {"formats": count, "wrong": wrong}


def _checkpoint(family: str, experts: str, dense: str) -> tuple[Callable[[Path], Path], dict[str, Any]]:
    """What makes a checkpoint in a folder, and its settings: a GGUF file, or weights that edgemoe quantises."""

    def quantised(folder: Path) -> Path:
        from bench.support.zoo import make

        with quiet_transformers():
            return make("qwen3_moe", folder)

    def gguf(folder: Path) -> Path:
        from gguf import GGMLQuantizationType

        from bench.support.gguf_files import GgufMaker

        kinds = GGMLQuantizationType[experts], GGMLQuantizationType[dense]
        return GgufMaker.of_zoo(family, folder).write(folder / "model.gguf", *kinds)

    return (quantised, {"experts": experts, "dense": dense}) if family == "quantised" else (gguf, {})


def _reply(model: Path, device: str, settings: Mapping[str, Any]) -> tuple[int, ...]:
    sampling = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
    with Engine.load(
        model, device=device, dtype="float32", state_folder="none", expert_cache="40%", **settings
    ) as engine:
        return engine.generate([5, 60, 70, 80, 9], sampling).token_ids
