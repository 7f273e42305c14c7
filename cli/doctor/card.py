"""Cards: their memory, their driver, their bus, and whether their kernels can be used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from edgemoe.cache import accelerator
from edgemoe.cli.doctor.check import NOTE, OK, Check
from edgemoe.cli.doctor.memory import locked_memory
from edgemoe.plan import machine
from edgemoe.plan.machine import Gpu
from edgemoe.sizes import format_bytes

_PINNED = 8 << 20


def cards() -> Iterator[Check]:
    """Every card, and what is needed to use it."""
    gpus = machine.gpus()
    usable = accelerator.available()
    if not gpus and not usable:
        yield Check("gpu", OK, "none; the CPU computes, with the experts on disk and the cache in memory")
        return
    for gpu in gpus:
        yield _gpu(gpu)
    if not usable:
        yield Check("cuda", NOTE, "this torch cannot use the GPU", "install a CUDA build of torch from pytorch.org")
        return
    yield _pinning()
    yield _triton()


def _gpu(gpu: Gpu) -> Check:
    told = [gpu.name, f"{format_bytes(gpu.free)} free of {format_bytes(gpu.total)}"]
    if gpu.capability is not None:
        told.append(f"compute capability {_dotted(gpu.capability)}")
        if gpu.capability < accelerator.MIN_BF16_CAPABILITY:
            least = _dotted(accelerator.MIN_BF16_CAPABILITY)
            told.append(f"below {least}: checkpoints in bfloat16 run in float16")
    if gpu.driver:
        told.append(f"driver {gpu.driver}")
    if gpu.lanes and gpu.max_lanes:
        told.append(f"PCIe x{gpu.lanes}")
        if gpu.lanes < gpu.max_lanes:
            advice = "experts come over this link: put the card into a slot with all lanes"
            return Check(f"gpu {gpu.index}", NOTE, f"{', '.join(told)} of x{gpu.max_lanes}", advice)
    return Check(f"gpu {gpu.index}", OK, ", ".join(told))


def _dotted(capability: tuple[int, int]) -> str:
    major, minor = capability
    return f"{major}.{minor}"


def _triton() -> Check:
    """Whether experts are computed by the GPU's own kernels."""
    from edgemoe.kernels.triton.availability import missing

    why = missing()
    if why:
        return Check("triton", NOTE, why, "passes on the GPU will be slower")
    return Check("triton", OK, "its kernels can be used")


def _pinning() -> Check:
    """Whether the system locks memory, which a card copies from beside other work."""
    advice = f"copies to the GPU will be slower; ulimit -l allows {locked_memory()}, and unlimited is best"
    try:
        pinned = torch.empty(_PINNED, dtype=torch.uint8, pin_memory=True).is_pinned()
    except RuntimeError as error:
        return Check("pinned memory", NOTE, f"refused: {str(error).splitlines()[0]}", advice)
    return Check("pinned memory", OK, "given") if pinned else Check("pinned memory", NOTE, "not given", advice)
