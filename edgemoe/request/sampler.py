"""Samples the next token from logits; the samples do not depend on drafts."""

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

MIN_TEMPERATURE = 1e-6
"""Lower temperatures are greedy: logits divided by them exceed float32's range."""


class Sampler:
    """Samples tokens for one request, with transformers' logits processors in transformers' order.

    A sample is the argmax of the processed logits plus Gumbel noise, which follows their softmax. The noise of future
    samples is drawn in advance: a drafter that adds the same noise to its own logits drafts the token that will be
    sampled, as far as its logits are right, and the samples do not depend on the drafts (Daliri, Musco and Suresh 2024,
    "Coupling without communication and drafter-invariant speculative decoding").
    """

    def __init__(self, settings: ResolvedSampling) -> None:
        self.greedy = settings.temperature < MIN_TEMPERATURE
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
        """Samples the token after `tokens` (prompt and reply) from its `logits`, float32 [vocabulary] on the CPU.

        Uses up the noise of one sample, unless greedy.
        """
        token = int(self.scores(tokens, logits).argmax())
        if not self.greedy:
            self._noise.popleft()
        return token

    def scores(self, tokens: Sequence[int], logits: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        """The scores, float32 [vocabulary], whose argmax is the sample after `tokens`.

        The last `ahead` of `tokens` are drafted: the scores have the noise of the sample after the next `ahead` ones.
        """
        scores = logits[None]
        if self._processors:
            scores = self._processors(torch.tensor([tokens]), scores)  # type: ignore[arg-type]
        if self.greedy:
            return scores[0]
        while len(self._noise) <= ahead:
            exponential = torch.empty(len(logits)).exponential_(generator=self._generator)
            self._noise.append(-exponential.log())
        return scores[0] + self._noise[ahead]
