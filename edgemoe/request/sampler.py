"""Draws the next token from logits, with or without drafts the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgemoe.sampling import ResolvedSampling

GREEDY_BELOW = 1e-6
"""Temperatures under this are greedy: dividing by them would leave float32's range."""


class Sampler:
    """Draws tokens for one request, with transformers' own logits processors in its order.

    A draw is the greatest of the processed logits plus Gumbel noise, which is a sample of their softmax. The noise
    of the draws to come is there before they are: whoever drafts with the same noise drafts what will be drawn as
    far as its logits are right, and what is drawn does not depend on what was drafted (Daliri, Musco and Suresh
    2024, "Coupling without communication and drafter-invariant speculative decoding").
    """

    def __init__(self, settings: ResolvedSampling) -> None:
        self.greedy = settings.temperature < GREEDY_BELOW
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._noise: deque[torch.Tensor] = deque()
        steps: list[Any] = []
        if settings.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self.greedy:
            if settings.temperature != 1:
                steps.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                steps.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                steps.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p:
                steps.append(MinPLogitsWarper(settings.min_p))
        self._processors = LogitsProcessorList(steps)

    def draw(self, tokens: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after `tokens` (prompt and reply), given its logits [vocabulary], float32 on the CPU."""
        token = int(self.scores(tokens, logits).argmax())
        if not self.greedy:
            self._noise.popleft()
        return token

    def scores(self, tokens: Sequence[int], logits: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        """The values, [vocabulary], whose greatest is drawn after `tokens`, which has `ahead` tokens not drawn yet."""
        scores = logits[None]
        if self._processors:
            scores = self._processors(torch.tensor([tokens]), scores)  # type: ignore[arg-type]
        if self.greedy:
            return scores[0]
        while len(self._noise) <= ahead:
            exponential = torch.empty(len(logits)).exponential_(generator=self._generator)
            self._noise.append(-exponential.log())
        return scores[0] + self._noise[ahead]
