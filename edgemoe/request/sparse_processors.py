"""Processors that change the logits of a few tokens, done in place: transformers' forms make several copies of all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from edgemoe.request.logits_processors import OccurrencePenalty

InPlace = Callable[[torch.Tensor, torch.Tensor], None]
"""Changes logits, float32 [vocabulary], after a text, int64 [tokens]."""


def in_place(processor: Any) -> InPlace | None:
    """What `processor`, a LogitsProcessor, does, in place; None where there is no such form."""
    kind = type(processor)
    if isinstance(processor, OccurrencePenalty):
        return processor.lower
    if kind is RepetitionPenaltyLogitsProcessor and processor.prompt_ignore_length is None:
        return partial(_penalise, processor.penalty)
    if kind is SequenceBiasLogitsProcessor and all(len(sequence) == 1 for sequence in processor.sequence_bias):
        tokens = torch.tensor([sequence[0] for sequence in processor.sequence_bias])
        return partial(_add, processor, tokens, torch.tensor(list(processor.sequence_bias.values()), dtype=torch.float))
    return None


def _penalise(penalty: float, text: torch.Tensor, logits: torch.Tensor) -> None:
    """The repetition penalty. Embeddings may have more tokens than there are logits."""
    tokens = text[text < len(logits)]
    own = logits[tokens]
    logits[tokens] = torch.where(own < 0, own * penalty, own / penalty)


def _add(processor: Any, tokens: torch.Tensor, biases: torch.Tensor, text: torch.Tensor, logits: torch.Tensor) -> None:
    if int(tokens.max()) >= len(logits):
        # It says which token there is no logit for.
        processor(text[None], logits[None])
    logits[tokens] += biases
