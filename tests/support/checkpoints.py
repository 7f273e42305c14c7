"""Tiny checkpoints, what transformers makes of them, and the parts of a loaded engine that the tests look into."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.support.policies.lru import BalancedLRU
from bench.support.zoo import make
from edgemoe.cache import ExpertCache, SlotPool
from edgemoe.cache.reader_link import ReaderLink
from edgemoe.cache.safetensors_store import SafetensorsStore
from edgemoe.cache.slot_classes import limit_slots, slot_classes
from edgemoe.checkpoint.blueprint import Blueprint, read_blueprint
from edgemoe.checkpoint.checkpoint import open_checkpoint
from edgemoe.checkpoint.dense_loader import load_dense
from edgemoe.experts import expert_layer
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.kernels.cpu.threads import KernelThreads
from edgemoe.model.sequential_runner import SequentialRunner
from edgemoe.quiet import quiet_transformers

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 250, (23,), generator=torch.Generator().manual_seed(1)).tolist()
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Zoo:
    """Makes each tiny checkpoint once a session."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def __call__(self, family: str, **how: Any) -> Path:
        """The folder of a checkpoint of `family`, made with `bench.support.zoo.make`; not to be changed.

        Skips the test where the installed transformers does not have the family yet.
        """
        import transformers

        key = repr((family, sorted(how.items())))
        if key not in self._made:
            if family not in transformers.CONFIG_MAPPING:
                pytest.skip(f"transformers {transformers.__version__} has no {family}")
            with quiet_transformers():
                self._made[key] = make(family, self._root / f"{len(self._made)}-{family}", **how)
        return self._made[key]


def reference(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The checkpoint as transformers itself loads it."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.to(device).eval()


def random_ids(length: int, seed: int = 0) -> list[int]:
    """`length` token ids of the tiny checkpoints' vocabulary, special ones left out."""
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def spread(logits: torch.Tensor) -> float:
    """The distance between the likeliest and the least likely: what differences are measured against."""
    return float(logits.max() - logits.min())


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' `generate` adds to `prompt`."""
    ids = torch.tensor([prompt], device=model.device)
    with quiet_transformers():
        return [int(token) for token in model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, len(prompt) :]]


@dataclass(frozen=True)
class Running:
    """A model with its experts behind a cache, put together without an engine."""

    model: Any
    layers: ExpertLayers
    cache: ExpertCache
    blueprint: Blueprint
    store: SafetensorsStore

    def runner(self, prefill_chunk: int = 1000) -> SequentialRunner:
        """The plain runner over it: the reference for everything that runs several sequences at once."""
        return SequentialRunner(self.model, self.layers, CPU, prefill_chunk, threads=1, nbytes_per_token=1)

    def logits(self, ids: list[int]) -> torch.Tensor:
        """The logits of every position, float32 [tokens, vocabulary]."""
        with quiet_transformers(), torch.inference_mode():
            return torch.as_tensor(self.model(torch.tensor([ids])).logits[0].float())


@contextmanager
def running(
    folder: Path, slots: int | None = None, *, dtype: str = "auto", plain: bool = False, threads: int = 1
) -> Iterator[Running]:
    """`folder` with `slots` slots (None is one for every expert) on the CPU; `plain` takes the reference arithmetic."""
    blueprint = read_blueprint(open_checkpoint(folder), dtype)
    model = load_dense(blueprint, CPU, lambda done, total: None)
    store = SafetensorsStore(
        blueprint.checkpoint.files,
        [moe.layout for moe in blueprint.experts_modules],
        blueprint.records,
    )
    slots = slots or sum(store.experts)
    classes = slot_classes([layout.nbytes for layout in store.layouts], store.experts)
    link, kernel_threads = ReaderLink(store, 2), KernelThreads(threads)
    with SlotPool(limit_slots(classes, slots), CPU) as pool:
        cache = ExpertCache(store, link, pool, BalancedLRU(len(blueprint.experts_modules), slots))
        layers = expert_layer.install(model, blueprint.experts_modules, cache, kernel_threads, plain=plain)
        try:
            yield Running(model, layers, cache, blueprint, store)
        finally:
            link.close()
            kernel_threads.close()
            store.close()


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
