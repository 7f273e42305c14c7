"""Samples the next token from logits; the samples do not depend on drafts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from edgemoe.errors import CheckpointError, LogitsError, RequestError, is_device_or_memory_error, reason
from edgemoe.model.pass_logits import DeviceRow, LogitsRow, on_host
from edgemoe.request.gumbel_noise import gumbel_noise
from edgemoe.request.kept_logits import Kept, LogitsSteps
from edgemoe.request.logits_processors import OccurrencePenalty, make_processors, without_state
from edgemoe.sampling import ResolvedSampling, Sampling, resolve

CHECKED = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
"""Fields of a checkpoint that have the range of a request's setting, and that setting."""


class Sampler:
    """Samples tokens for one request, with transformers' logits processors in transformers' order.

    A sample is the argmax of the processed logits plus Gumbel noise, which follows their softmax. The noise of future
    samples is known in advance: a drafter that adds the same noise to its own logits drafts the token that will be
    sampled, as far as its logits are right, and the samples do not depend on the drafts (Daliri, Musco and Suresh 2024,
    "Coupling without communication and drafter-invariant speculative decoding").
    """

    def __init__(self, settings: ResolvedSampling, prompt_length: int, vocabulary: int) -> None:
        """For a reply to `prompt_length` tokens, of a model with logits for `vocabulary` tokens."""
        self.greedy = not settings.generation.do_sample
        self._seed = settings.seed
        self._drawn = 0
        own = []
        if settings.presence_penalty or settings.frequency_penalty:
            own.append(OccurrencePenalty(prompt_length, settings.presence_penalty, settings.frequency_penalty))
        self.processors = make_processors(settings.generation, prompt_length, vocabulary, own)
        """What the logits go through, transformers' LogitsProcessorList."""
        self._steps = LogitsSteps(self.processors, greedy=self.greedy)
        for_drafts = without_state(self.processors)
        self._for_drafts = LogitsSteps(for_drafts)
        self._drafts_likeliest = self.greedy and not for_drafts

    def draw(self, tokens: Sequence[int], logits: LogitsRow) -> int:
        """Samples the token after `tokens` (prompt and reply) from its `logits`.

        Of a device's, the best few are enough for greedy and for top-k before which nothing but the temperature changes
        logits; else all are read. Uses up the noise of one sample, unless greedy. Raises LogitsError where the logits
        have a NaN or are infinite, and where the settings leave no token.
        """
        found = self._with_noise(self._steps.run(tokens, logits))
        place = int(found.scores.argmax())
        # A NaN is the largest of all, so that the best score tells of any.
        if not math.isfinite(float(found.scores[place])):
            _check_finite(logits, float(found.scores[place]))
        self._drawn += 1
        return found.token(place)

    def scores(self, tokens: Sequence[int], logits: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        """The scores, float32 [vocabulary], whose argmax is likely to be the sample after `tokens`.

        The last `ahead` of `tokens` are drafted: the scores have the noise of the sample after the next `ahead` ones.
        """
        return self._with_noise(self._for_drafts.run(tokens, logits), ahead).spread(len(logits))

    def candidates(
        self, tokens: Sequence[int], logits: LogitsRow, count: int, ahead: int = 0
    ) -> list[tuple[int, float]]:
        """The `count` tokens of the highest `scores`, highest first, and the softmax of these: none of 0.

        Of a device's logits they may be fewer: at most `pass_logits.BEST`.
        """
        if self._drafts_likeliest and isinstance(logits, DeviceRow):
            return logits.likeliest(count)
        kept = self._with_noise(self._for_drafts.run(tokens, logits), ahead)
        best = kept.scores.softmax(-1).topk(min(count, len(kept.scores)))
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [(kept.token(place), probability) for probability, place in found if probability > 0]

    def _with_noise(self, kept: Kept, ahead: int = 0) -> Kept:
        if self.greedy:
            return kept
        tokens = torch.arange(len(kept.scores)) if kept.ids is None else kept.ids
        return kept._replace(scores=kept.scores + gumbel_noise(self._seed, self._drawn + ahead, tokens))


def _check_finite(logits: LogitsRow, best: float) -> None:
    """Raises LogitsError unless `best`, which is not finite, is the score of a token that the settings force."""
    highest = float(on_host(logits).max())
    if not math.isfinite(highest):
        raise LogitsError(
            f"the model's logits are not finite ({highest}), as after an overflow of float16 or with damaged weights: "
            "give another dtype=, or check the checkpoint's files and fetch it again"
        )
    if best != math.inf:
        raise LogitsError("the settings of the request leave no token that may follow: allow more of them")


def check_defaults(defaults: Any, source: str, vocabulary: int) -> None:
    """Raises CheckpointError, with the field, unless replies can be sampled with `defaults`, a GenerationConfig.

    `source` names where they come from.
    """
    try:
        Sampling(**{CHECKED[name]: getattr(defaults, name) for name in CHECKED})
        for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.0)):
            settings = resolve(sampling, defaults, default_max_tokens=1, room=1)
            Sampler(settings, 1, vocabulary).draw([0], torch.zeros(vocabulary))
    except (RequestError, TypeError, ValueError, OverflowError, IndexError, AttributeError, RuntimeError) as error:
        if is_device_or_memory_error(error):
            raise
        raise CheckpointError(
            f"{source} does not say how to sample ({reason(error)}): mend it, or remove it"
        ) from error
