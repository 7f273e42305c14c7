"""Seam 1: the experts modules of a transformers model, one a MoE layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from edgemoe.cache.record import Part, RecordLayout
from edgemoe.errors import CheckpointError

DECLARED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""What transformers' `use_experts_implementation` declares on an experts module."""
EXPERT_WORDS = ("expert", "moe", "router")
"""What is in the class names of a family that has experts of some kind."""


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module: its path in the model, how many experts it has, and one expert's layout."""

    name: str
    experts: int
    layout: RecordLayout

    def module(self, model: nn.Module) -> Any:
        """This site's module in `model`."""
        return model.get_submodule(self.name)


def find_experts_modules(model: nn.Module) -> list[ExpertsModule]:
    """Every experts module of `model` that transformers dispatches, in the order of the layers."""
    return [
        _site(name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in DECLARED) and "down_proj" in module._parameters
    ]


def require_experts_modules(model: nn.Module, config: Any, name: str) -> list[ExpertsModule]:
    """`find_experts_modules`, or a CheckpointError that says which of the two reasons there is for having none."""
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
    """Takes the stacked expert weights out of the module: they live in the store, not in the model."""
    module = moe.module(model)
    for part in moe.layout.parts:
        module._parameters[part.name] = None
    # transformers initialises modules that were not loaded; this one has nothing left to initialise.
    module._is_hf_initialized = True


def _site(name: str, module: nn.Module) -> ExpertsModule:
    experts = module._parameters["down_proj"].shape[0]  # type: ignore[union-attr]
    parts = [
        Part(key, tuple(value.shape[1:]), value.dtype)
        for key, value in module._parameters.items()
        if value is not None and value.dim() >= 2 and value.shape[0] == experts
    ]
    return ExpertsModule(name, experts, RecordLayout(parts))
