"""Token steps: a prompt in chunks, then one token after the other. Knows token ids and logits, no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from edgemoe.expert_math import KERNEL_TOKENS
from edgemoe.kv_cache import has_recurrent_state, new_cache
from edgemoe.quiet import quiet_transformers
from edgemoe.torch_threads import torch_threads

AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""How far logits may differ, relative to their spread, for two ways of computing the same thing."""

LONG_PAST = 256
"""Tokens; attention over a longer past is worth PyTorch's threads again."""
WORTH_THREADS = 64 << 20
"""Tokens times the weight bytes that each one multiplies; a pass with less is done sooner by one thread."""


class Decoder:
    """Runs one model. Its state is in the sequences, so that any number of them may exist."""

    def __init__(
        self, model: Any, device: torch.device, prefill_chunk: int, threads: int, nbytes_per_token: int
    ) -> None:
        import inspect

        self._model = model
        self._device = device
        self._prefill_chunk = prefill_chunk
        self._threads = threads
        self._nbytes_per_token = nbytes_per_token
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._extends_in_chunks: bool | None = None
        self._seen: set[bool] = set()

    def start(self, room: int) -> Past:
        """An empty sequence that will have at most `room` tokens."""
        return Past(new_cache(self._model, room))

    def prefill(self, sequence: Past, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        """Runs `prompt` in chunks and yields, after each, its last token's logits, float32 [vocabulary] on the CPU.

        Only those of the last chunk continue the prompt; the others are where a caller may stop.
        """
        size = self._prefill_chunk if len(prompt) > self._prefill_chunk and self._can_chunk(prompt) else len(prompt)
        for start in range(0, len(prompt), size):
            yield self.step(sequence, prompt[start : start + size])

    def step(self, sequence: Past, tokens: Sequence[int]) -> torch.Tensor:
        """Appends `tokens` to `sequence` and returns the last one's logits, float32 [vocabulary] on the CPU."""
        # With few tokens our kernels have the cores, and with little work there is nothing to share; PyTorch's
        # threads would spin on the cores between operations.
        few = len(tokens) <= KERNEL_TOKENS or len(tokens) * self._nbytes_per_token < WORTH_THREADS
        few = few and sequence.tokens < LONG_PAST
        sequence.tokens += len(tokens)
        with torch.inference_mode(), torch_threads(1 if few else self._threads), self._first_quiet(len(tokens) > 1):
            ids = torch.tensor([list(tokens)], device=self._device)
            extra = {"logits_to_keep": 1} if self._keeps_last else {}
            output = self._model(input_ids=ids, past_key_values=sequence.cache, use_cache=True, **extra)
            sequence.cache = output.past_key_values
            return output.logits[0, -1].float().cpu()  # type: ignore[no-any-return]

    def _first_quiet(self, several: bool) -> AbstractContextManager[None]:
        """Silences transformers in the first pass of each kind: that is when it tells what it falls back on."""
        if several in self._seen:
            return nullcontext()
        self._seen.add(several)
        return quiet_transformers()

    def _can_chunk(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt may be run in parts.

        Rows of keys and values always allow it. Of the families with a recurrent state some extend it by
        one token only, and say so by being wrong: so the first tokens are run both ways and compared,
        once a model.
        """
        if self._extends_in_chunks is None:
            self._extends_in_chunks = not has_recurrent_state(self.start(1).cache) or self._chunks_agree(prompt[:8])
        return self._extends_in_chunks

    def _chunks_agree(self, tokens: Sequence[int]) -> bool:
        half = len(tokens) // 2
        whole, parts = self.start(len(tokens)), self.start(len(tokens))
        expected = self.step(whole, tokens)
        self.step(parts, tokens[:half])
        found = self.step(parts, tokens[half:])
        for state, other in zip(_first_state(whole.cache), _first_state(parts.cache), strict=True):
            if (state - other).norm() > 0.01 * state.norm():
                return False
        scale = float(expected.max() - expected.min()) or 1.0
        return float((expected - found).abs().max()) <= AGREEMENT[self._model.dtype] * scale


def _first_state(cache: Any) -> list[torch.Tensor]:
    """The recurrent state of the first layer that has one: it depends on the tokens only, so that it hardly rounds."""
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None)
        if states:
            return [state.float() for state in states.values() if state is not None]
    return []


class Past:
    """One sequence's keys, values and states; `cache` is None until the first step where a model makes its own."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.tokens = 0
