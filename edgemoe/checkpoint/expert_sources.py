"""Locates each expert's bytes in a checkpoint's files, by the conversions that transformers declares.

transformers declares how a family's checkpoint becomes its parameters: as operations on tensors that stack all experts
of a layer. Every such operation is independent for each index of the first dimension, so running it on one expert
gives that expert's slice. The common operations need not run at all: the bytes already are in the record's order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from edgemoe.cache.record import ExpertId
from edgemoe.cache.safetensors_store import Extent, RecordSource
from edgemoe.checkpoint.checkpoint import Checkpoint, TensorEntry
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.errors import CheckpointError


@dataclass
class _Recipe:
    """How one stacked parameter is made: its converter (None for a plain tensor), and its source keys by pattern."""

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)


class ExpertSources:
    """The checkpoint's tensors that belong to experts, and the record source of every expert."""

    def __init__(
        self, checkpoint: Checkpoint, model: Any, experts_modules: Sequence[ExpertsModule], mapping: Sequence[Any]
    ) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._modules = experts_modules
        self._recipes = self._collect(mapping)
        self.keys = frozenset(
            key for recipe in self._recipes.values() for keys in recipe.sources.values() for key in keys
        )
        """The names of the checkpoint's tensors that belong to experts."""

    def records(self) -> dict[ExpertId, RecordSource]:
        """The source of every expert's record."""
        return {
            ExpertId(layer, index): self._record(moe, index)
            for layer, moe in enumerate(self._modules)
            for index in range(moe.experts)
        }

    def _collect(self, mapping: Sequence[Any]) -> dict[str, _Recipe]:
        """Groups the checkpoint's keys by the stacked expert parameter that they become part of."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        targets = {f"{moe.name}.{part.name}" for moe in self._modules for part in moe.layout.parts}
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = self._model.state_dict()
        recipes: dict[str, _Recipe] = {}
        for key in sorted(self._checkpoint.tensors, key=dot_natural_key):
            prefix = self._model.base_model_prefix
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, pattern = key, None
            converter = by_pattern.get(pattern or "")
            made = {target}
            if converter is not None:
                first, *others = converter.target_patterns
                made |= {target.replace(first, other) for other in others}
            for name in made & targets:
                recipe = recipes.setdefault(name, _Recipe(converter))
                recipe.sources.setdefault(pattern or key, []).append(key)
        return recipes

    def _record(self, moe: ExpertsModule, index: int) -> RecordSource:
        layout = moe.layout
        plain: list[Extent] = []
        for part, start in zip(layout.parts, layout.offsets, strict=True):
            recipe = self._recipe(moe, part.name)
            entries = self._entries(recipe, moe, index)
            if not self._is_plain(recipe, entries, part.dtype):
                return self._assembled(moe, index)
            for entry in entries:
                plain.append(_extent(entry, start))
                start += entry.nbytes
        return RecordSource(tuple(plain), None)

    def _recipe(self, moe: ExpertsModule, part: str) -> _Recipe:
        recipe = self._recipes.get(f"{moe.name}.{part}")
        if recipe is None:
            raise CheckpointError(f"{self._checkpoint.name} lacks the tensors of {moe.name}.{part}: fetch it again")
        return recipe

    def _entries(self, recipe: _Recipe, moe: ExpertsModule, index: int) -> list[TensorEntry]:
        """One expert's tensors in the order of the converter's patterns: its own ones, or its slices of stacks."""
        patterns = recipe.converter.source_patterns if recipe.converter else list(recipe.sources)
        found = []
        for pattern in patterns:
            keys = recipe.sources.get(pattern, [])
            if len(keys) == moe.experts:
                found.append(self._checkpoint.tensors[keys[index]])
            elif len(keys) == 1:
                found.append(_slice(self._checkpoint.tensors[keys[0]], index, moe.experts))
            elif keys:
                raise CheckpointError(
                    f"{self._checkpoint.name} has {len(keys)} tensors {pattern} in {moe.name}, not one for each of "
                    f"{moe.experts} experts: fetch it again"
                )
        return found

    def _is_plain(self, recipe: _Recipe, entries: Sequence[TensorEntry], dtype: torch.dtype) -> bool:
        """Whether the record is the bytes of `entries` in their order: a plain stack, or a concatenation of rows."""
        if any(entry.dtype != dtype for entry in entries):
            return False
        if recipe.converter is None:
            return True
        from transformers.core_model_loading import Concatenate, MergeModulelist

        match recipe.converter.operations:
            case [MergeModulelist(dim=0)]:
                return len(entries) == 1
            case [MergeModulelist(dim=0), Concatenate(dim=1)]:
                return True
        return False

    def _assembled(self, moe: ExpertsModule, index: int) -> RecordSource:
        recipes = {part.name: self._recipe(moe, part.name) for part in moe.layout.parts}
        entries = {name: self._entries(recipe, moe, index) for name, recipe in recipes.items()}

        def assemble(raw: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
            remaining, parts = list(raw), {}
            for name, recipe in recipes.items():
                mine = [remaining.pop(0) for _ in entries[name]]
                parts[name] = self._convert(recipe, moe, name, mine)
            return parts

        extents = tuple(_extent(entry, None) for found in entries.values() for entry in found)
        return RecordSource(extents, assemble)

    def _convert(self, recipe: _Recipe, moe: ExpertsModule, part: str, raw: Sequence[torch.Tensor]) -> torch.Tensor:
        """Runs transformers' operations on one expert: a list of one tensor if they stack, else a stack of one."""
        if recipe.converter is None:
            return raw[0]
        converter = copy.copy(recipe.converter)
        patterns = [pattern for pattern in converter.source_patterns if recipe.sources.get(pattern)]
        stacked = any(len(keys) > 1 for keys in recipe.sources.values()) or moe.experts == 1
        values: Any = {
            pattern: [tensor if stacked else tensor.unsqueeze(0)] for pattern, tensor in zip(patterns, raw, strict=True)
        }
        name = f"{moe.name}.{part}"
        for operation in converter.operations:
            values = operation.convert(
                values,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=self._model,
                config=self._model.config,
                missing_keys=None,
            )
        for pattern, value in values.items():
            if name.endswith(pattern.replace("\\", "").lstrip(".")) or len(values) == 1:
                tensor: torch.Tensor = value[0] if isinstance(value, list) else value
                return tensor[0]
        raise CheckpointError(
            f"{self._checkpoint.name}: transformers' conversion of {name} gave {list(values)} instead"
        )


def _extent(entry: TensorEntry, slot_offset: int | None) -> Extent:
    return Extent(entry.file, entry.offset, entry.shape, entry.dtype, entry.nbytes, slot_offset)


def _slice(entry: TensorEntry, index: int, experts: int) -> TensorEntry:
    """The slice of a stacked tensor that belongs to expert `index`."""
    nbytes = entry.nbytes // experts
    return TensorEntry(entry.file, entry.offset + index * nbytes, nbytes, entry.shape[1:], entry.dtype)
