"""What two models must have in common for their predictions to be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgemoe.errors import CheckpointError


@dataclass(frozen=True)
class Vocabulary:
    """A checkpoint's tokens: its tokenizer, or None, and how many ids it predicts."""

    model: str
    tokenizer: Any
    size: int

    def check_same(self, other: Vocabulary) -> None:
        """Raises CheckpointError where an id of `other` means something else, or it has more or fewer of them."""
        if self.size != other.size or self._words() != other._words():
            raise CheckpointError(
                f"{other.model} has another vocabulary than {self.model}, so that their predictions cannot be "
                f"compared: give a checkpoint with the same tokenizer with --against"
            )

    def _words(self) -> object:
        return None if self.tokenizer is None else self.tokenizer.get_vocab()
