"""Loads all weights but the experts', through transformers' own conversion."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgemoe.cache.accelerator import keeping_generators
from edgemoe.cache.host_buffer import memory_of_its_own
from edgemoe.cache.record import host_bytes
from edgemoe.checkpoint.blueprint import Blueprint, build_skeleton, load_config
from edgemoe.checkpoint.experts_module import release_weights
from edgemoe.checkpoint.packed.packed_tensor import MergedTensor, PackedTensor, Weight
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.errors import CheckpointError, reading
from edgemoe.quiet import quiet_transformers


class LazyTensor:
    """A checkpoint tensor that is read when it is indexed, as transformers' loader does with safetensors slices.

    Files are read, not mapped, so that none of their pages count as this process's memory.
    """

    def __init__(self, path: Path, entry: TensorEntry, on_read: Callable[[int], None]) -> None:
        self._path = path
        self._entry = entry
        self._on_read = on_read

    def __getitem__(self, everything: Any) -> torch.Tensor:
        entry = self._entry
        buffer = memory_of_its_own(entry.nbytes)
        with self._path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            memory, done = host_bytes(buffer), 0
            while done < entry.nbytes:
                count = file.readinto(memory[done:])
                if not count:
                    raise OSError(f"{self._path} ends at byte {entry.offset + done}, in the middle of a tensor")
                done += count
        self._on_read(entry.nbytes)
        tensor = buffer.view(entry.dtype).view(entry.shape)
        return tensor if everything is Ellipsis else tensor[everything]

    def get_shape(self) -> list[int]:
        """The tensor's shape, as a list like that of a safetensors slice."""
        return list(self._entry.shape)


class LazyPacked:
    """A packed weight that is read, and widened to the dtype of the computation, when it is indexed."""

    def __init__(self, weight: PackedTensor | MergedTensor, stored: list[LazyTensor], dtype: torch.dtype) -> None:
        self._weight = weight
        self._stored = stored
        self._dtype = dtype

    def __getitem__(self, everything: Any) -> torch.Tensor:
        tensor = self._weight.float([each[...] for each in self._stored], self._dtype)
        return tensor if everything is Ellipsis else tensor[everything]

    def get_shape(self) -> list[int]:
        """See `LazyTensor`."""
        return list(self._weight.shape)


def load_dense(blueprint: Blueprint, device: torch.device, on_read: Callable[[int, int], None]) -> Any:
    """The model on `device` with all weights but the experts'; its experts modules have none.

    Loader threads call `on_read(done, total)` with bytes, one call at a time. Raises CheckpointError if a file cannot
    be read, or if transformers' loader fails after the blueprint's checks passed.
    """
    checkpoint = blueprint.checkpoint
    weights = checkpoint.weights
    total = sum(weights[key].nbytes for key in blueprint.dense_keys)
    lock, done = threading.Lock(), [0]

    def count(nbytes: int) -> None:
        with lock:
            done[0] += nbytes
            on_read(done[0], total)

    def lazy_tensor(entry: TensorEntry) -> LazyTensor:
        return LazyTensor(checkpoint.files[entry.file], entry, count)

    def lazy_weight(weight: Weight) -> LazyTensor | LazyPacked:
        if isinstance(weight, TensorEntry):
            return lazy_tensor(weight)
        return LazyPacked(weight, [lazy_tensor(each) for each in weight.stored.values()], blueprint.dtype)

    packed = {each.key for each in blueprint.packed_modules}
    lazy = {key: lazy_weight(weights[key]) for key in blueprint.dense_keys if key not in packed}
    model = build_skeleton(blueprint.model_class, blueprint.config, blueprint.dtype, blueprint.head)
    for moe in blueprint.experts_modules:
        release_weights(moe, model)
    with reading(checkpoint.name), torch.no_grad():
        for module in blueprint.packed_modules:
            raw = [lazy_tensor(each)[...] for each in module.stored]
            module.install(model, module.weight(raw, blueprint.dtype, device))
    settings = load_config(model, blueprint.dtype, device)
    # The loader draws random initial values, which must not advance the caller's generators.
    with reading(checkpoint.name), quiet_transformers(), torch.no_grad(), keeping_generators(device):
        info, _ = model._load_pretrained_model(model, lazy, None, settings)
        info = model._finalize_model_loading(model, settings, info)
    lost = sorted(info.missing_keys) + sorted(info.conversion_errors)
    if lost:
        raise CheckpointError(f"{checkpoint.name}: {lost[0]} could not be loaded: fetch it again")
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if left:
        raise CheckpointError(f"{checkpoint.name}: {left[0]} got no value from transformers' loader: fetch it again")
    model.requires_grad_(False)
    return model.eval()
