"""A card that is not there, whose memory is counted: tensors of it have shapes and no data.

Code of the package runs on them as it is. What it allocates on the card goes through `CachingAllocator`, and what it
page-locks is counted exactly. The values of a tensor cannot be read, and no kernel runs.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.no_card.caching_allocator import CachingAllocator
from edgemoe.cache import accelerator
from edgemoe.checkpoint.dense_loader import LazyTensor

CARD = torch.device("cuda:0")


class CountedCard:
    """A card with a memory of `nbytes`, beside a host that lets any amount be page-locked."""

    def __init__(self, nbytes: int) -> None:
        self.memory = CachingAllocator(nbytes)
        self.locked = 0
        """Bytes of the host that are page-locked."""
        self._modes = (FakeTensorMode(allow_non_fake_inputs=True), _Counter(self.memory), _WithoutCuda())

    @contextmanager
    def there(self) -> Iterator[None]:
        """In the block, the package takes the card for one that is there."""
        memory = self.memory
        of_torch: dict[str, Callable[..., Any]] = {
            "mem_get_info": lambda device: (memory.capacity - memory.reserved, memory.capacity),
            "memory_reserved": lambda device: memory.reserved,
            "memory_allocated": lambda device: memory.allocated,
        }
        # PyTorch itself is told of no card: it would try to initialise it.
        of_ours: dict[str, Callable[..., Any]] = {
            "available": lambda: True,
            "count": lambda: 1,
            "device_name": lambda device: "no card",
            "multiplies_bf16": lambda device: True,
            "lock_host": self._lock,
            "unlock_host": self._unlock,
            "new_stream": lambda device: mock.Mock(),
            "current_stream": lambda device: mock.Mock(),
        }
        with ExitStack() as stack:
            for module, fakes in ((torch.cuda, of_torch), (accelerator, of_ours)):
                for name, fake in fakes.items():
                    stack.enter_context(mock.patch.object(module, name, fake))
            yield

    @contextmanager
    def tensors(self) -> Iterator[None]:
        """In the block, the calling thread's tensors have no data, and those of the card are counted.

        Weights are not read from their files. To be entered inside of `there`.
        """

        def unread(lazy: Any, everything: Any) -> torch.Tensor:
            return torch.empty(lazy._entry.shape, dtype=lazy._entry.dtype)

        with (
            # The modes below are those of one thread.
            mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
            mock.patch.object(torch.cuda, "get_rng_state"),
            mock.patch.object(torch.cuda, "set_rng_state"),
            mock.patch.object(LazyTensor, "__getitem__", unread),
            self._modes[0],
            self._modes[1],
            self._modes[2],
        ):
            yield

    def _lock(self, memory: torch.Tensor) -> bool:
        self.locked += memory.numel()
        return True

    def _unlock(self, memory: torch.Tensor) -> None:
        self.locked -= memory.numel()


class _Counter(TorchDispatchMode):
    """Tells the allocator of every storage on the card, when it is made and when its last tensor is gone."""

    def __init__(self, memory: CachingAllocator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, found)
        return found

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        if accelerator.is_accelerator(tensor.device):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._memory.take(key, storage.nbytes())
                self._known[key] = weakref.ref(storage, lambda gone: self._gone(key))
        return tensor

    def _gone(self, key: int) -> None:
        del self._known[key]
        self._memory.give(key)


class _WithoutCuda(TorchFunctionMode):
    """Runs functions on tensors of the card where PyTorch, built without CUDA, refuses to.

    Such a function runs on the meta device, which gives the shapes of its results. Attention never holds the scores of
    all pairs, as in the kernels that a card has for it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(args[0], args[2])
        if func is torch.tensor:
            made = torch.tensor(*args, **kwargs | {"device": "cpu"})
            return torch.empty(made.shape, dtype=made.dtype, device=kwargs.get("device"))
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "not linked with support" not in str(error):
                raise
        return _by_shapes(func, args, kwargs)


def _attention(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    outputs = query.new_empty(*query.shape[:-1], value.shape[-1])
    query.new_empty(query.shape[:-1], dtype=torch.float32)  # the logarithms of the rows' sums
    return outputs


def _by_shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` gives, as tensors of the card: views where its results are, new ones else."""
    twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def twin(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        twins[made.untyped_storage()._cdata] = tensor, made
        return made

    with unset_fake_temporarily():
        found = func(*tree_map_only(torch.Tensor, twin, args), **tree_map_only(torch.Tensor, twin, kwargs))

    def back(result: torch.Tensor) -> torch.Tensor:
        key = result.untyped_storage()._cdata
        if key not in twins:
            return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=CARD)
        origin, made = twins[key]
        if result is made:
            return origin
        return origin.as_strided(result.shape, result.stride(), origin.storage_offset() + result.storage_offset())

    return tree_map_only(torch.Tensor, back, found)
