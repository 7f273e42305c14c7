"""The logits processors of a request: those that `generate` makes, in its order, and OpenAI's penalties."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor

NOT_DONE = ("guidance_scale", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
"""Fields whose processors need other passes of the model, or an encoder."""
HAVE_A_STATE = (SynthIDTextWatermarkLogitsProcessor,)
"""Processors that must see every token of a reply once, in order: no draft goes through them."""


class OccurrencePenalty(LogitsProcessor):
    """OpenAI's penalties on the tokens of the reply so far.

    A token's score is lowered by `frequency` for every time it occurs, and by `presence` if it occurs at all.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length = prompt_length
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` lowered, float32 [1, vocabulary]; `input_ids` is [1, tokens], prompt and reply."""
        scores = scores.clone()
        self.lower(input_ids[0], scores[0])
        return scores

    def lower(self, text: torch.Tensor, scores: torch.Tensor) -> None:
        """Lowers `scores`, float32 [vocabulary], after `text`, int64 [tokens], prompt and reply."""
        tokens, counts = text[self._prompt_length :].unique(return_counts=True)
        scores[tokens] = scores[tokens] - self._frequency * counts - self._presence


def make_processors(
    generation: GenerationConfig, prompt_length: int, vocabulary: int, own: Sequence[LogitsProcessor] = ()
) -> LogitsProcessorList:
    """What `generate` puts the logits through, with `generation`, after a prompt of `prompt_length` tokens.

    `own` come after those of `generate` that do not depend on sampling. Raises ValueError or TypeError, with the name
    of the field, for a value that transformers refuses.
    """
    model: Any = SimpleNamespace(
        config=SimpleNamespace(
            is_encoder_decoder=False, get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary)
        ),
        _merge_criteria_processor_list=lambda made, more: LogitsProcessorList([*made, *more]),
    )
    generation = copy.copy(generation)
    for name in NOT_DONE:
        setattr(generation, name, None)
    ends = generation.eos_token_id
    generation._eos_token_tensor = None if ends is None else torch.tensor(ends, dtype=torch.long).reshape(-1)
    # A private function, but the only place that has the order; a test compares the tokens with those of `generate`.
    return GenerationMixin._get_logits_processor(
        model, generation, input_ids_seq_length=prompt_length, device="cpu", logits_processor=LogitsProcessorList(own)
    )


def without_state(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those of `processors` that may be called for tokens that are only drafted."""
    return LogitsProcessorList([each for each in processors if not isinstance(each, HAVE_A_STATE)])
