"""One request from prompt to reply: token steps, sampling, text, stopping and measuring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from edgemoe.cache import CacheCounters
from edgemoe.decoder import Decoder
from edgemoe.results import Chunk, Timings, TokenLogprob
from edgemoe.sampling import ResolvedSampling, Sampler
from edgemoe.text_stream import Detokenizer, NoText, StopTexts


class Generation:
    """Iterating gives the reply's chunks, one a token; the last has the finish reason."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        prompt: Sequence[int],
        settings: ResolvedSampling,
        counters: CacheCounters,
        cancelled: Callable[[], bool],
    ) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._prompt_length = len(prompt)
        self._settings = settings
        self._counters = counters
        self._before = counters.copy()
        self._cancelled = cancelled
        self._sampler = Sampler(settings)
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else NoText()
        self._stops = StopTexts(settings.stop)
        self._started = time.perf_counter()
        self._first_at = 0.0

    def __iter__(self) -> Iterator[Chunk]:
        past = self._decoder.start(self._prompt_length + self._settings.max_tokens)
        logits = torch.empty(0)
        for logits in self._decoder.prefill(past, self._tokens):  # noqa: B007  the last chunk's are what counts
            if self._cancelled():
                yield self._chunk("", (), "cancelled", None)
                return
        while True:
            token = self._sampler.draw(self._tokens, logits)
            self._first_at = self._first_at or time.perf_counter()
            self._tokens.append(token)
            reason, text = self._advance(token)
            yield self._chunk(text, (token,), reason, self._logprobs(token, logits))
            if reason is not None:
                return
            if self._cancelled():
                yield self._chunk(self._rest(), (), "cancelled", None)
                return
            logits = self._decoder.step(past, [token])

    def _advance(self, token: int) -> tuple[str | None, str]:
        """Why the reply ends after `token`, if it does, and the text that may be given out."""
        if token in self._settings.eos:
            return "stop", self._rest()
        text = self._stops.push(self._detokenizer.push(token))
        if self._stops.found:
            return "stop", text
        if len(self._tokens) - self._prompt_length >= self._settings.max_tokens:
            text += self._rest()
            return ("stop" if self._stops.found else "length"), text
        return None, text

    def _rest(self) -> str:
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()

    def _logprobs(self, token: int, logits: torch.Tensor) -> tuple[TokenLogprob, ...] | None:
        count = self._settings.logprobs
        if count is None:
            return None
        values = logits.log_softmax(-1)
        best = values.topk(count)
        top = tuple((int(index), self._name(int(index)), float(value)) for value, index in zip(*best, strict=True))
        return (TokenLogprob(token, self._name(token), float(values[token]), top),)

    def _name(self, token: int) -> str:
        return str(self._tokenizer.decode([token])) if self._tokenizer is not None else str(token)

    def _chunk(
        self, text: str, tokens: tuple[int, ...], reason: str | None, logprobs: tuple[TokenLogprob, ...] | None
    ) -> Chunk:
        now = time.perf_counter()
        first = self._first_at or now
        before, after = self._before, self._counters
        timings = Timings(
            prompt_tokens=self._prompt_length,
            generated_tokens=len(self._tokens) - self._prompt_length,
            prompt_seconds=first - self._started,
            generate_seconds=now - first,
            time_to_first_token=first - self._started,
            bytes_loaded=after.bytes_loaded - before.bytes_loaded,
            hits=after.hits - before.hits,
            misses=after.misses - before.misses,
        )
        return Chunk(text, tokens, reason, logprobs, timings)
