"""Locates each expert's bytes in a checkpoint's files, by the conversions that transformers declares.

transformers declares how a family's checkpoint becomes its parameters: as operations on tensors that stack all experts
of a layer. Every such operation is independent for each index of the first dimension, so running it on one expert
gives that expert's slice. The common operations need not run at all: the bytes already are in the record's order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from edgemoe.cache.record import ExpertId, Part, RecordLayout
from edgemoe.cache.safetensors_store import Extent, RecordSource
from edgemoe.checkpoint.checkpoint import Checkpoint
from edgemoe.checkpoint.experts_module import ExpertsModule
from edgemoe.checkpoint.packed.packed_tensor import MergedTensor, PackedTensor
from edgemoe.checkpoint.renaming import Renaming
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.errors import CheckpointError
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.made import made_format
from edgemoe.formats.stacked_format import StackedFormat
from edgemoe.formats.weight_format import MakeableFormat, WeightFormat

Source = TensorEntry | PackedTensor


@dataclass
class _Recipe:
    """How one stacked parameter is made: its converter (None for a plain tensor), and its source keys by pattern."""

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)


class ExpertSources:
    """The checkpoint's tensors that belong to experts, and the record source of every expert."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Any,
        experts_modules: Sequence[ExpertsModule],
        renaming: Renaming,
        made: str | None = None,
    ) -> None:
        """`made` is the format of `formats.made` that float matrices are quantised to as they are read, if any.

        Raises CheckpointError if `made` is given and the checkpoint has its experts packed already.
        """
        self._checkpoint = checkpoint
        self._made = made
        self._floats = {moe.name: moe for moe in experts_modules}
        """The experts modules with float weights, by name."""
        self._weights = checkpoint.weights
        self._model = model
        self._recipes = self._collect(renaming, experts_modules)
        self.keys = frozenset(
            key for recipe in self._recipes.values() for keys in recipe.sources.values() for key in keys
        )
        """The names of the checkpoint's tensors and packed weights that belong to experts."""
        layouts: dict[tuple[Part, ...], RecordLayout] = {}
        self.modules = [self._as_stored(moe, layouts) for moe in experts_modules]
        """The experts modules with the formats in which the checkpoint has their weights."""

    def records(self) -> dict[ExpertId, RecordSource]:
        """The source of every expert's record, in the layouts of `modules`."""
        return {
            ExpertId(layer, index): self._record(moe, index)
            for layer, moe in enumerate(self.modules)
            for index in range(moe.experts)
        }

    def _collect(self, renaming: Renaming, experts_modules: Sequence[ExpertsModule]) -> dict[str, _Recipe]:
        """Groups the checkpoint's keys by the stacked expert parameter that they become part of."""
        from transformers.core_model_loading import dot_natural_key

        targets = {f"{moe.name}.{name}" for moe in experts_modules for name in moe.shapes}
        recipes: dict[str, _Recipe] = {}
        for key in sorted(self._weights, key=dot_natural_key):
            made = renaming.target(key)
            for name in made.names & targets:
                recipe = recipes.setdefault(name, _Recipe(made.converter))
                recipe.sources.setdefault(made.pattern or key, []).append(key)
        return recipes

    def _as_stored(self, moe: ExpertsModule, layouts: dict[tuple[Part, ...], RecordLayout]) -> ExpertsModule:
        """`moe` with the packed formats of its matrices, where their bytes can be taken as they are.

        Layouts are shared between layers, since views of slots are kept by layout.
        """
        formats, parts = dict(moe.formats), []
        for name in moe.shapes:
            own = [part for part in moe.layout.parts if part.name == name]
            recipe = self._recipes.get(f"{moe.name}.{name}")
            if recipe is not None and name in formats:
                packed = self._packed_format(recipe, moe) or self._made_format(moe, name)
                if packed is not None:
                    formats[name], rows, columns = packed
                    own = list(formats[name].parts(name, (rows, columns)))
            parts += own
        layout = layouts.setdefault(tuple(parts), RecordLayout(parts))
        return replace(moe, layout=layout, formats=formats)

    def _packed_format(self, recipe: _Recipe, moe: ExpertsModule) -> tuple[WeightFormat, int, int] | None:
        """The format, rows and columns of a matrix in a record; None where it is widened as it is read."""
        entries = self._entries(recipe, moe, 0)
        packed = [entry for entry in entries if isinstance(entry, PackedTensor)]
        if len(packed) < len(entries) or not packed or not self._keeps_order(recipe, entries):
            return None
        first = packed[0]
        if any(entry.reshape or isinstance(entry.format, FloatFormat) for entry in packed):
            return None
        if self._made is not None:
            raise CheckpointError(
                f"{self._checkpoint.name} has its experts in {first.format.name}, so that they cannot be quantised to "
                f"{self._made}: leave out experts="
            )
        if len(packed) == 1:
            return first.format, first.rows, first.columns
        if any((entry.rows, entry.columns, entry.transposed) != (first.rows, first.columns, False) for entry in packed):
            return None
        stacked = StackedFormat(tuple(entry.format for entry in packed), first.rows)
        return stacked, first.rows * len(packed), first.columns

    def _made_format(self, moe: ExpertsModule, name: str) -> tuple[WeightFormat, int, int] | None:
        """The format, rows and columns of a float matrix that is quantised; None where it stays as it is."""
        if self._made is None:
            return None
        rows, columns = moe.matrix_shape(name)
        return made_format(self._made, columns), rows, columns

    def _record(self, moe: ExpertsModule, index: int) -> RecordSource:
        """The extents of one expert: those of packed weights and plain ones in the order of the layout's parts."""
        plain = list[Extent]()
        for name in moe.shapes:
            recipe = self._recipe(moe, name)
            entries = self._entries(recipe, moe, index)
            extents = self._extents(moe, name, recipe, entries)
            if extents is None:
                return self._assembled(moe, index)
            plain += extents
        return RecordSource(tuple(plain), None)

    def _extents(
        self, moe: ExpertsModule, name: str, recipe: _Recipe, entries: Sequence[Source]
    ) -> list[Extent] | None:
        """Where the bytes of one parameter go in a record; None where they must be converted first."""
        if self._is_made(moe, name):
            return None
        if _is_packed(moe, name):
            packed = self._same_formats(moe, name, entries)
            if any(entry.convert for entry in packed):
                return None
            return [_extent(entry, moe.layout.part_offset(part)) for part, entry in _stored_parts(name, packed)]
        part = next(part for part in moe.layout.parts if part.name == name)
        start, found = moe.layout.part_offset(name), []
        if not self._is_plain(recipe, entries, part.dtype):
            return None
        for entry in entries:
            assert isinstance(entry, TensorEntry)
            found.append(_extent(entry, start))
            start += entry.nbytes
        return found

    def _same_formats(self, moe: ExpertsModule, name: str, entries: Sequence[Source]) -> list[PackedTensor]:
        """`entries` of one expert, which must be packed as those of the layer's first one are."""
        kind = moe.formats[name]
        wanted = kind.formats if isinstance(kind, StackedFormat) and len(entries) > 1 else (kind,)
        packed = [entry for entry in entries if isinstance(entry, PackedTensor)]
        if [entry.format for entry in packed] != list(wanted) or len(packed) < len(entries):
            raise CheckpointError(
                f"{self._checkpoint.name} packs the experts of {moe.name} in several formats, which is not read: "
                "use another version of it"
            )
        return packed

    def _is_made(self, moe: ExpertsModule, name: str) -> bool:
        """Whether the parameter `name` is quantised as it is read."""
        return self._made is not None and name in moe.formats

    def _recipe(self, moe: ExpertsModule, part: str) -> _Recipe:
        recipe = self._recipes.get(f"{moe.name}.{part}")
        if recipe is None:
            raise CheckpointError(f"{self._checkpoint.name} lacks the tensors of {moe.name}.{part}: fetch it again")
        return recipe

    def _entries(self, recipe: _Recipe, moe: ExpertsModule, index: int) -> list[Source]:
        """One expert's tensors in the order of the converter's patterns: its own ones, or its slices of stacks."""
        patterns = recipe.converter.source_patterns if recipe.converter else list(recipe.sources)
        found = list[Source]()
        for pattern in patterns:
            keys = recipe.sources.get(pattern, [])
            if len(keys) == moe.experts:
                found.append(self._source(keys[index]))
            elif len(keys) == 1:
                found.append(_of_stack(self._source(keys[0]), index, moe.experts))
            elif keys:
                raise CheckpointError(
                    f"{self._checkpoint.name} has {len(keys)} tensors {pattern} in {moe.name}, not one for each of "
                    f"{moe.experts} experts: fetch it again"
                )
        return found

    def _source(self, key: str) -> Source:
        weight = self._weights[key]
        assert not isinstance(weight, MergedTensor), f"{key} is no expert's"
        return weight

    def _is_plain(self, recipe: _Recipe, entries: Sequence[Source], dtype: torch.dtype) -> bool:
        """Whether the record is the bytes of `entries` in their order: a plain stack, or a concatenation of rows."""
        if any(not isinstance(entry, TensorEntry) or entry.dtype != dtype for entry in entries):
            return False
        return self._keeps_order(recipe, entries)

    @staticmethod
    def _keeps_order(recipe: _Recipe, entries: Sequence[Source]) -> bool:
        """Whether the conversion only stacks experts and concatenates their rows."""
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
        recipes = {name: self._recipe(moe, name) for name in moe.shapes}
        entries = {name: self._entries(recipe, moe, index) for name, recipe in recipes.items()}
        floats_of = self._floats[moe.name]
        dtypes = {part.name: part.dtype for part in floats_of.layout.parts}

        def assemble(raw: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
            remaining, parts = list(raw), dict[str, torch.Tensor]()
            for name, recipe in recipes.items():
                mine = [[remaining.pop(0) for _ in _stored(entry)] for entry in entries[name]]
                made = self._is_made(moe, name)
                if made or not _is_packed(moe, name):
                    floats = [_float(entry, own, dtypes[name]) for entry, own in zip(entries[name], mine, strict=True)]
                    matrix = self._convert(recipe, moe, name, floats)
                    parts |= self._quantised(moe, name, matrix) if made else {name: matrix}
                    continue
                packed = self._same_formats(moe, name, entries[name])
                prefixes = _prefixes(name, packed)
                for prefix, entry, own in zip(prefixes, packed, mine, strict=True):
                    parts |= entry.made(own, prefix)
            return parts

        extents = tuple(
            _extent(stored, None) for found in entries.values() for entry in found for stored in _stored(entry)
        )
        return RecordSource(extents, assemble)

    def _quantised(self, moe: ExpertsModule, name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of one matrix in a record, from its float tensor as transformers has it."""
        kind, upright = moe.formats[name], matrix.t() if name in moe.declared_transposed else matrix
        assert isinstance(kind, MakeableFormat)
        return {name + suffix: part for suffix, part in kind.quantize(upright).items()}

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


def _is_packed(moe: ExpertsModule, name: str) -> bool:
    """Whether a record has the parameter `name` packed; biases, which have no format, are floats."""
    return name in moe.formats and not isinstance(moe.formats[name], FloatFormat)


def _extent(entry: TensorEntry, slot_offset: int | None) -> Extent:
    return Extent(entry.file, entry.offset, entry.shape, entry.dtype, entry.nbytes, slot_offset)


def _of_stack(source: Source, index: int, experts: int) -> Source:
    """What belongs to expert `index` of a stack."""
    return source.slice(index, experts) if isinstance(source, TensorEntry) else source.expert(index)


def _stored(source: Source) -> list[TensorEntry]:
    """The tensors in the files that make `source` up."""
    return [source] if isinstance(source, TensorEntry) else list(source.stored.values())


def _float(source: Source, raw: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """transformers' tensor of `source`, from its tensors in the files."""
    return raw[0] if isinstance(source, TensorEntry) else source.float(raw, dtype)


def _prefixes(name: str, packed: Sequence[PackedTensor]) -> list[str]:
    """What the names of each one's parts in a record begin with: as in `StackedFormat` where there are several."""
    return [name] if len(packed) == 1 else [f"{name}.{at}" for at in range(len(packed))]


def _stored_parts(name: str, packed: Sequence[PackedTensor]) -> list[tuple[str, TensorEntry]]:
    """The parts of one matrix in a record, with their tensors in the files."""
    return [
        (prefix + suffix, stored)
        for prefix, entry in zip(_prefixes(name, packed), packed, strict=True)
        for suffix, stored in entry.stored.items()
    ]
