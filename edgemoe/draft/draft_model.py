"""A second, smaller checkpoint that drafts for the first: checked, sized and loaded by transformers itself."""

from __future__ import annotations

import os
from typing import Any

import torch

from edgemoe.checkpoint.blueprint import Blueprint
from edgemoe.checkpoint.checkpoint import Checkpoint, open_checkpoint
from edgemoe.checkpoint.tokenizer import load_tokenizer
from edgemoe.errors import CheckpointError, reason
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.experts.router_hook import CurrentLayer
from edgemoe.model.model_runner import ModelRunner
from edgemoe.model.sequential_runner import SequentialRunner
from edgemoe.plan.kv_size import KvSize, kv_from_config
from edgemoe.plan.plan import Plan
from edgemoe.quiet import quiet_transformers


class DraftModel:
    """A checkpoint that can draft for a target: what it takes before it is loaded, and then its runner."""

    def __init__(self, name: str | os.PathLike[str], target: Blueprint, *, offline: bool) -> None:
        """Raises CheckpointError when it cannot be read, or does not have the target's vocabulary."""
        from transformers import AutoConfig

        self.checkpoint = open_checkpoint(name, offline=offline, setting="draft_model")
        self._dtype = target.dtype
        with quiet_transformers():
            self._config = AutoConfig.from_pretrained(self.checkpoint.folder, local_files_only=True)
        if _vocabulary(self.checkpoint, self._config) != _vocabulary(target.checkpoint, target.config):
            raise CheckpointError(
                f"{self.checkpoint.name} has another vocabulary than {target.checkpoint.name}, so it cannot draft "
                f"for it: give a checkpoint with the same tokenizer as draft_model="
            )

    @property
    def weight_nbytes(self) -> int:
        """Bytes of its weights as they are loaded."""
        return sum(
            entry.nbytes // entry.dtype.itemsize * self._dtype.itemsize for entry in self.checkpoint.tensors.values()
        )

    @property
    def kv(self) -> KvSize:
        """What its past takes: keys and values of all layers, as if none had a window."""
        return kv_from_config(self._config, self._dtype.itemsize)

    def load(self, plan: Plan) -> ModelRunner:
        """Its runner, on the plan's device. Raises CheckpointError when transformers cannot load it."""
        from transformers import AutoModelForCausalLM

        device = torch.device(plan.device)
        try:
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self.checkpoint.folder, dtype=self._dtype, local_files_only=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.checkpoint.name} cannot draft, since transformers cannot load it ({reason(error)}): "
                f"give another checkpoint as draft_model="
            ) from error
        model: Any = loaded.to(device).requires_grad_(False).eval()
        layers = ExpertLayers(CurrentLayer(model, []))
        runner = ModelRunner(
            SequentialRunner(model, layers, device, plan.prefill_chunk, plan.threads, self.weight_nbytes)
        )
        if not runner.verifies:
            raise CheckpointError(
                f"{self.checkpoint.name} cannot draft, since {runner.refusal}: "
                f"give a checkpoint of another family as draft_model="
            )
        return runner


def _vocabulary(checkpoint: Checkpoint, config: Any) -> object:
    """What two models must have in common: their tokens, or as many where they have no tokenizer."""
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is not None:
        return tokenizer.get_vocab()
    return config.get_text_config().vocab_size
