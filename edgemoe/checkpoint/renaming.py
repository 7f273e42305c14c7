"""Which of a model's parameters a checkpoint's tensor becomes, by the renamings and conversions of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Target(NamedTuple):
    """What one tensor of a checkpoint becomes, alone or with others."""

    names: frozenset[str]
    """The parameters that it is part of."""
    pattern: str | None
    """The converter's pattern that its name matches; None without a converter."""
    converter: Any
    """transformers' converter; None where the tensor is the parameter as it is."""


class Renaming:
    """The renamings of one model's checkpoints."""

    def __init__(self, model: Any, mapping: Sequence[Any]) -> None:
        """`mapping` is what transformers declares for `model`."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def target(self, key: str) -> Target:
        """What the checkpoint's tensor `key` becomes."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        if name not in self._state and key in self._state:
            name, pattern = key, None
        converter = self._by_pattern.get(pattern or "")
        names = {name}
        if converter is not None:
            first, *others = converter.target_patterns
            names |= {name.replace(first, other) for other in others}
        return Target(frozenset(names), pattern, converter)
