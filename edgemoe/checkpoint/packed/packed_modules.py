"""The layers outside of the experts whose weights stay packed, or are quantised as they are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edgemoe.checkpoint.draft_head import of_head
from edgemoe.checkpoint.packed.packed_tensor import PackedTensor, Weight
from edgemoe.checkpoint.renaming import Renaming
from edgemoe.checkpoint.tensor_entry import TensorEntry
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.gguf_format import GgufFormat
from edgemoe.formats.made import made_format
from edgemoe.formats.weight_format import MakeableFormat, WeightFormat
from edgemoe.kernels.packed_layers import PackedEmbedding, PackedLinear, PackedWeight

MIN_MADE_VALUES = 1 << 12
"""Values of a matrix below which quantising saves nothing worth its loss."""


@dataclass(frozen=True)
class PackedModule:
    """A linear layer, or an embedding, whose weight is kept in a packed format."""

    name: str
    """Its path in the model."""
    key: str
    """The weight in the checkpoint."""
    source: TensorEntry | PackedTensor
    """The same; a plain tensor is quantised as it is read."""
    format: WeightFormat
    rows: int
    columns: int
    head: str | None = None
    """The path of the layer that shares an embedding's weight, if any."""

    @property
    def stored(self) -> list[TensorEntry]:
        """The tensors in the file that the weight is made of."""
        return [self.source] if isinstance(self.source, TensorEntry) else list(self.source.stored.values())

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.nbytes for part in self.format.parts("", (self.rows, self.columns)))

    @property
    def float_nbytes(self) -> int:
        """Bytes of what is in memory while it is read: a float copy too, where it is quantised."""
        return self.nbytes + (self.source.nbytes if isinstance(self.source, TensorEntry) else 0)

    def weight(self, raw: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device) -> PackedWeight:
        """The weight, from its tensors in the file."""
        if isinstance(self.source, PackedTensor):
            parts = self.source.made(raw)
        else:
            assert isinstance(self.format, MakeableFormat)
            parts = self.format.quantize(raw[0].view(self.rows, self.columns))
        moved = {name: part.to(device) for name, part in parts.items()}
        return PackedWeight(self.format, moved, (self.rows, self.columns), dtype)

    def install(self, model: nn.Module, weight: PackedWeight) -> None:
        """Replaces the layer in `model`, and the one that shares its weight."""
        if isinstance(model.get_submodule(self.name), nn.Embedding):
            model.set_submodule(self.name, PackedEmbedding(weight))
        else:
            model.set_submodule(self.name, self._linear(model, self.name, weight))
        if self.head is not None:
            model.set_submodule(self.head, self._linear(model, self.head, weight))
            # transformers must not look for a parameter to share.
            model.all_tied_weights_keys.pop(f"{self.head}.weight")  # type: ignore[operator, union-attr]

    @staticmethod
    def _linear(model: nn.Module, name: str, weight: PackedWeight) -> PackedLinear:
        return PackedLinear(weight, getattr(model.get_submodule(name), "bias", None))


def find_packed_modules(
    model: nn.Module,
    weights: Mapping[str, Weight],
    renaming: Renaming,
    made: str | None,
    expert_counts: Collection[int],
) -> list[PackedModule]:
    """The layers of `model` whose weights, of `weights` outside of the experts, stay packed.

    `made` is the format that the large float matrices are quantised to, if any: not the head, as nearly all do who
    publish quantised checkpoints, and not routers, which have as many rows as a layer has experts. A draft head is
    small, and drafts badly with few bits: it stays as it is.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    found = []
    for key, weight in weights.items():
        target = renaming.target(key)
        parameter = next(iter(target.names))
        name = parameter.removesuffix(".weight")
        module = _submodule(model, name) if target.converter is None and parameter.endswith(".weight") else None
        if module is None:
            continue
        if isinstance(weight, PackedTensor) and _keeps(module, weight):
            shares = next((each.removesuffix(".weight") for each, own in tied.items() if own == f"{name}.weight"), None)
            found.append(PackedModule(name, key, weight, weight.format, weight.rows, weight.columns, shares))
        elif isinstance(weight, TensorEntry) and made is not None and type(module) is nn.Linear and not of_head(name):
            rows, columns = module.weight.shape
            small = rows * columns < MIN_MADE_VALUES or rows in expert_counts
            if not small and module.weight is not head and f"{name}.weight" not in tied:
                found.append(PackedModule(name, key, weight, made_format(made, columns), rows, columns))
    return found


def _keeps(module: nn.Module, weight: PackedTensor) -> bool:
    """Whether the layer can have the packed matrix as it is in the file."""
    is_matrix = weight.experts is None and not weight.transposed and weight.reshape is None
    if not is_matrix or isinstance(weight.format, FloatFormat):
        return False
    return type(module) is nn.Linear or (type(module) is nn.Embedding and isinstance(weight.format, GgufFormat))


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
