"""The experts modules of a transformers model, one per MoE layer: the seam where edgemoe takes the experts over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgemoe.cache.record import Part, RecordLayout
from edgemoe.errors import CheckpointError
from edgemoe.formats.float_format import FloatFormat
from edgemoe.formats.made import made_format
from edgemoe.formats.weight_format import WeightFormat

DECLARED_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""Attributes that transformers' `use_experts_implementation` sets on an experts module."""
EXPERT_WORDS = ("expert", "moe", "router")
"""Parts of lower-case class names by which a family with experts of any kind is recognised."""


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module: its path in the model, the number of its experts, and the layout of one expert's record."""

    name: str
    experts: int
    layout: RecordLayout
    formats: Mapping[str, WeightFormat]
    """How each weight matrix is stored, by its name in the module. Biases, a part each, have no format."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of one expert's share of each stacked parameter, in transformers' order."""
    declared_transposed: frozenset[str] = frozenset()
    """The matrices that the family declares as [inputs, outputs]."""

    @property
    def transposed(self) -> frozenset[str]:
        """The matrices that a record has as [inputs, outputs]: as the family declares, where they are floats."""
        return frozenset(name for name in self.declared_transposed if isinstance(self.formats[name], FloatFormat))

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """The outputs and the inputs of the matrix `name`."""
        first, second = self.shapes[name]
        return (second, first) if name in self.declared_transposed else (first, second)

    def made_layout(self, made: str) -> RecordLayout:
        """The layout of a record whose matrices are quantised to `made`, a format of `formats.made`."""
        parts: list[Part] = []
        for name in self.shapes:
            if name in self.formats:
                shape = self.matrix_shape(name)
                parts += made_format(made, shape[1]).parts(name, shape)
            else:
                parts += [part for part in self.layout.parts if part.name == name]
        return RecordLayout(parts)

    def module(self, model: nn.Module) -> Any:
        """This experts module in `model`."""
        return model.get_submodule(self.name)

    def block(self, model: nn.Module) -> nn.Module:
        """The MoE block in `model` that calls the router and this module, whatever its family calls it."""
        return model.get_submodule(self.name.rpartition(".")[0])


def find_experts_modules(model: nn.Module) -> list[ExpertsModule]:
    """All experts modules of `model` that go through transformers' experts interface, in the order of the layers."""
    layouts: dict[tuple[Part, ...], RecordLayout] = {}
    return [
        _experts_module(name, module, layouts)
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in DECLARED_ATTRIBUTES) and "down_proj" in module._parameters
    ]


def require_experts_modules(model: nn.Module, config: Any, name: str) -> list[ExpertsModule]:
    """As `find_experts_modules`, but raises CheckpointError if there are none.

    The message says whether the family, of the model that the user calls `name`, has no experts or experts that do not
    go through transformers' interface.
    """
    experts_modules = find_experts_modules(model)
    if experts_modules:
        return experts_modules
    family = config.model_type
    if any(word in type(module).__name__.lower() for module in model.modules() for word in EXPERT_WORDS):
        raise CheckpointError(
            f"{name} is of the family {family}, whose experts transformers does not dispatch: edgemoe cannot run it"
        )
    raise CheckpointError(
        f"{name} is not a Mixture-of-Experts model ({family} without experts): run it with transformers"
    )


def release_weights(moe: ExpertsModule, model: nn.Module) -> None:
    """Removes the stacked expert weights from the module in `model`: the store has them."""
    module = moe.module(model)
    for name in moe.shapes:
        module._parameters[name] = None
    # Keeps transformers from initialising the module, which has no weights left.
    module._is_hf_initialized = True


def _experts_module(name: str, module: nn.Module, layouts: dict[tuple[Part, ...], RecordLayout]) -> ExpertsModule:
    """`layouts` are those of other layers by their parts, to be shared: views of slots are kept by layout."""
    experts = module._parameters["down_proj"].shape[0]  # type: ignore[union-attr]
    parts: list[Part] = []
    formats: dict[str, WeightFormat] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in module._parameters.items():
        if value is None or value.dim() < 2 or value.shape[0] != experts:
            continue
        shape = shapes[key] = tuple(value.shape[1:])
        if len(shape) == 1:
            parts.append(Part(key, shape, value.dtype))
        else:
            formats[key] = FloatFormat(value.dtype)
            parts += formats[key].parts(key, shape)
    layout = layouts.setdefault(tuple(parts), RecordLayout(parts))
    transposed = frozenset(formats if module.is_transposed else ())
    return ExpertsModule(name, experts, layout, formats, shapes, transposed)
