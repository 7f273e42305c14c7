"""What is asked of a compute device that is no CPU. No other module of the package names a backend of PyTorch.

The backend is `torch.cuda`: CUDA, and under the same names ROCm. Another one, such as `torch.xpu`, is added here.
Nothing in this module touches a device when it is imported, so that a process may still fork.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

TYPE = "cuda"
"""The type of the devices, as in "cuda:0"."""
MIN_BF16_CAPABILITY = (8, 0)
"""The first NVIDIA devices with instructions for products of bfloat16."""


def is_accelerator(device: torch.device | str) -> bool:
    """Whether `device`, a device or its name such as "cuda:0", is one that this module speaks of."""
    return torch.device(device).type == TYPE


def available() -> bool:
    """Whether PyTorch can use such a device here."""
    return bool(torch.cuda.is_available())


def count() -> int:
    """The number of devices; their indices are 0 to count - 1."""
    return int(torch.cuda.device_count())


def device_name(device: torch.device | str) -> str:
    """What its maker calls `device`."""
    return str(torch.cuda.get_device_name(device))


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether `device` has instructions for products of bfloat16; on AMD devices that PyTorch supports, always."""
    if torch.version.hip is not None:
        return True
    return tuple(torch.cuda.get_device_capability(device)) >= MIN_BF16_CAPABILITY


def free_nbytes(device: torch.device | str) -> int:
    """Bytes of `device` that can be allocated now, with those that PyTorch has reserved and does not use.

    By what PyTorch says: the driver numbers devices in its own order, whatever CUDA_VISIBLE_DEVICES says.
    """
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def segment_nbytes(nbytes: int) -> int:
    """Bytes that PyTorch's allocator takes for each of many buffers of `nbytes`, with their share of the gaps.

    Requests above 1 MiB and below 10 MiB lie in segments of 20 MiB, larger ones in segments of multiples of 2 MiB.
    """
    mib = 1 << 20
    if nbytes <= mib:
        return nbytes
    return 20 * mib // (20 * mib // nbytes) if nbytes < 10 * mib else -(-nbytes // (2 * mib)) * 2 * mib


def synchronize(device: torch.device | str) -> None:
    """Blocks until all work queued on `device` is done."""
    torch.cuda.synchronize(device)


def release_unused() -> None:
    """Gives back what PyTorch keeps and does not use: memory of the devices, and page-locked memory of the host."""
    torch.cuda.empty_cache()
    # From PyTorch 2.13 on; an older one may have it under a private name.
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def keeping_generators(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random generators of the CPU and of `device` when the block ends."""
    devices = [device.index or 0] if is_accelerator(device) and available() else []
    kept: AbstractContextManager[None] = torch.random.fork_rng(devices=devices, device_type=TYPE)
    return kept


# --- streams and events -----------------------------------------------------------------------------


def new_stream(device: torch.device) -> Any:
    """A stream of `device` that waits for no other one. It has PyTorch's methods: `wait_stream`, `wait_event`, ..."""
    return torch.cuda.Stream(device)


def current_stream(device: torch.device) -> Any:
    """The stream on which the calling thread queues work of `device`."""
    return torch.cuda.current_stream(device)


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """In the block, the calling thread queues its work on `stream`, an object of `new_stream`."""
    context: AbstractContextManager[Any] = torch.cuda.stream(stream)
    return context


def selected(device: torch.device) -> AbstractContextManager[None]:
    """In the block, `device` is the one that code without a word about devices means."""
    context: AbstractContextManager[None] = torch.cuda.device(device)
    return context


def new_event(*, timed: bool = False) -> Any:
    """An event that a stream records; two `timed` ones tell the milliseconds between them (`elapsed_time`)."""
    return torch.cuda.Event(enable_timing=timed)


# --- graphs -----------------------------------------------------------------------------------------


def new_graph_pool() -> Any:
    """A memory pool that several graphs may share, as long as they are replayed in the order of their capture."""
    return torch.cuda.graph_pool_handle()


class Graph:
    """Work of one stream that is captured once and then queued with one call. Its memory is taken while it lives."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._place: tuple[int, Any] | None = None
        """The device, and the pool that was given, while the capture is under way."""

    def begin(self, pool: Any = None) -> None:
        """The work that the calling thread queues on the current stream from now on is captured and not run.

        The current stream must not be the default one (see `on_stream`). Memory comes from `pool`, of
        `new_graph_pool`; without it the graph has a pool of its own. Other threads may use the device meanwhile.
        """
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        self._place = torch.cuda.current_device(), pool

    def end(self) -> None:
        """Ends the capture. Raises RuntimeError where something cannot be captured."""
        place, self._place = self._place, None
        try:
            self._graph.capture_end()
        except RuntimeError:
            # PyTorch's allocator would go on as if the capture were under way, and free nothing for the rest of it.
            if place is not None and place[1] is not None:
                with suppress(RuntimeError, AttributeError):
                    torch._C._cuda_endAllocateToPool(*place)
                    torch._C._cuda_releasePool(*place)
            raise

    def replay(self) -> None:
        """Queues all of the captured work on the current stream."""
        self._graph.replay()


# --- memory of the host -----------------------------------------------------------------------------


def lock_host(memory: torch.Tensor) -> bool:
    """Page-locks `memory`, uint8 on the host, so that devices copy from it asynchronously.

    False where there is no device, or where the system limits locked memory and refuses.
    """
    if not available():
        return False
    refused = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) != 0
    if refused:
        _forget_the_last_error()
    return not refused


def unlock_host(memory: torch.Tensor) -> None:
    """Unlocks what `lock_host` locked. No copy of it may be in flight."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _forget_the_last_error() -> None:
    """Takes the error of a refused call from the CUDA runtime, which reports it again at the next kernel launch."""
    with suppress(RuntimeError):
        torch.zeros(1, device=TYPE)
