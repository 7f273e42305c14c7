"""Token steps: a prompt in chunks, then one token after the other. Knows token ids and logits, no text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.kernels.cpu.gemv_kernels import few_tokens
from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.model.draft_tree import TreeMask, additive
from edgemoe.model.kv_cache import SequenceCache, has_recurrent_state
from edgemoe.quiet import quiet_transformers

AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""How far logits may differ, relative to their spread, for two ways of computing the same thing."""

WORTH_THREADS = 2 << 30
"""Tokens times the weight bytes that each one multiplies; a pass with less is done sooner by one thread ..."""
WORTH_PAIRS = 1 << 16
"""... unless more pairs of tokens than this attend to one another.

Threads that share little work mostly wait for each other, and for long where other programs run on the cores.
"""

PROBE_TOKENS = 8
"""Tokens that are run both ways to see whether two ways agree."""


class PassInput(NamedTuple):
    """Tokens to append to one sequence in a pass."""

    cache: SequenceCache
    tokens: Sequence[int]
    every: bool = False
    """Whether the logits of all of them are wanted, [tokens, vocabulary], and not the last one's alone."""
    tree_mask: TreeMask | None = None
    """How they lie beside the past where they do not simply follow one another."""
    verifies: bool = False
    """Whether drafts are verified by the logits, which then must not depend on what was drafted."""

    @property
    def outputs(self) -> int:
        """Tokens of which the logits are wanted."""
        return len(self.tokens) if self.every else 1

    @property
    def positions(self) -> Sequence[int]:
        """The tokens' positions."""
        if self.tree_mask is not None:
            return self.tree_mask.positions
        return range(self.cache.tokens, self.cache.tokens + len(self.tokens))


class SequentialRunner:
    """Runs one model, one sequence a pass. Its state is in the sequences, so that any number of them may exist."""

    def __init__(
        self,
        model: Any,
        layers: ExpertLayers,
        device: torch.device,
        prefill_chunk: int,
        threads: int,
        nbytes_per_token: int,
        expert_share: float = 1.0,
    ) -> None:
        """`expert_share` is the share of a layer's experts that a token uses."""
        self.model = model
        self.layers = layers
        self.device = device
        self.prefill_chunk = prefill_chunk
        self._threads = threads
        self._nbytes_per_token = nbytes_per_token
        self._expert_share = expert_share
        self.keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._few_tokens = few_tokens(model.dtype) if device.type == "cpu" else 0
        self._extends_in_chunks: bool | None = None
        self._seen: set[object] = set()

    def start(self, capacity: int) -> SequenceCache:
        """An empty sequence with room for `capacity` tokens."""
        return SequenceCache.empty(self.model, capacity)

    def prefill(self, sequence: SequenceCache, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        """Runs `prompt` in chunks and yields, after each, its last token's logits, float32 [vocabulary] on the CPU.

        Only those of the last chunk continue the prompt; the others are where a caller may stop.
        """
        small = len(prompt) <= self.prefill_chunk
        size = len(prompt) if small or not self.can_chunk(prompt) else self.prefill_chunk
        for start in range(0, len(prompt), size):
            yield self.step(sequence, prompt[start : start + size])

    def step(self, sequence: SequenceCache, tokens: Sequence[int]) -> torch.Tensor:
        """Appends `tokens` to `sequence` and returns the last one's logits, float32 [vocabulary] on the CPU."""
        return self.run([PassInput(sequence, tokens)])[0]

    def run(self, inputs: Sequence[PassInput]) -> list[torch.Tensor]:
        """Runs `inputs`, one after the other: the reference for everything that runs several at once.

        For each its last token's logits, float32 [vocabulary] on the CPU, or all of its tokens' where `every`.
        """
        results = []
        for item in inputs:
            with self.passing([item], kind=(len(item.tokens) > 1, item.tree_mask is None)):
                results.append(self.forward(item))
        return results

    def forward(self, inputs: PassInput) -> torch.Tensor:
        """The pass of `run` for one, for callers that are inside of `passing` already."""
        sequence = inputs.cache
        ids = torch.tensor([list(inputs.tokens)], device=self.device)
        extra: dict[str, Any] = {"logits_to_keep": inputs.outputs} if self.keeps_last else {}
        if inputs.tree_mask is not None:
            extra["position_ids"] = torch.tensor([inputs.positions], device=self.device)
            extra["attention_mask"] = self._masks(sequence, inputs.tree_mask)
        output = self.model(input_ids=ids, past_key_values=sequence.kv, use_cache=True, **extra)
        sequence.kv = output.past_key_values
        sequence.tokens += len(inputs.tokens)
        logits = output.logits[0, -inputs.outputs :].float().cpu()
        return logits if inputs.every else logits[-1]  # type: ignore[no-any-return]

    def _masks(self, sequence: SequenceCache, tree_mask: TreeMask) -> Any:
        """A 4-D mask, or one for each kind of attention where the model has several, [1, 1, tokens, keys]."""
        text = self.model.config.get_text_config(decoder=True)
        layers = sequence.kv.layers
        kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * len(layers))
        masks = {}
        for kind, layer in zip(kinds, layers, strict=False):
            if kind in masks:
                continue
            keys, _ = layer.get_mask_sizes(len(tree_mask.ancestors))
            window = layer.sliding_window if layer.is_sliding else None
            visible = tree_mask.visible(keys, window).to(self.device)
            masks[kind] = additive(visible, self.model.dtype)[None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @contextmanager
    def passing(self, inputs: Sequence[PassInput], *, kind: object) -> Iterator[None]:
        """What every pass runs in: no gradients, as many of PyTorch's threads as pay, silence in the first of a kind.

        Silent is the first pass of each `kind`, since that is when transformers tells what it falls back on.
        """
        tokens = sum(len(item.tokens) for item in inputs)
        pairs = sum(len(item.tokens) * (item.cache.tokens + len(item.tokens)) for item in inputs)
        small = tokens * self._nbytes_per_token < WORTH_THREADS and pairs < WORTH_PAIRS
        # Either our kernels have the cores or PyTorch has: its threads go on spinning after an operation, on the
        # very cores that ours would run on next.
        alone = small or tokens <= self._few_tokens or self._spread_thin(tokens)
        quiet = nullcontext() if kind in self._seen else quiet_transformers()
        self._seen.add(kind)
        with torch.inference_mode(), torch_threads(1 if alone else self._threads), quiet:
            yield

    def batch_invariant(self, inputs: Sequence[PassInput]) -> bool:
        """Whether the tokens of a pass can have, and shall have, the bits that steps over single tokens give.

        They can where the kernels multiply all of them. More tokens than that, other CPUs and GPUs go without: there a
        loop over tokens would cost more than drafts gain.
        """
        tokens = sum(len(item.tokens) for item in inputs)
        return 1 < tokens <= self._few_tokens and any(item.verifies for item in inputs)

    def _spread_thin(self, tokens: int) -> bool:
        """Whether each expert gets so few of `tokens` that kernels save more on experts than they cost elsewhere."""
        return tokens <= 4 * self._few_tokens and tokens * self._expert_share <= self._few_tokens / 4

    @property
    def bulk_from(self) -> int:
        """Tokens from which a pass leaves our kernels for PyTorch's products; 0 where there are no kernels."""
        if not self._few_tokens:
            return 0
        thin = min(4 * self._few_tokens, int(self._few_tokens / 4 / self._expert_share))
        return max(self._few_tokens, thin, (WORTH_THREADS - 1) // self._nbytes_per_token) + 1

    def can_chunk(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt may be run in parts.

        Rows of keys and values always allow it. Of the families with a recurrent state some extend it by
        one token only, and say so by being wrong: so the first tokens are run both ways and compared,
        once a model.
        """
        if self._extends_in_chunks is None:
            sample = (list(prompt) * PROBE_TOKENS)[:PROBE_TOKENS]
            rows_only = not has_recurrent_state(self.start(1).kv)
            self._extends_in_chunks = rows_only or self._chunks_agree(sample)
        return self._extends_in_chunks

    def _chunks_agree(self, tokens: Sequence[int]) -> bool:
        half = len(tokens) // 2
        whole, parts = self.start(len(tokens)), self.start(len(tokens))
        with self.layers.silenced():
            expected = self.step(whole, tokens)
            self.step(parts, tokens[:half])
            found = self.step(parts, tokens[half:])
        for state, other in zip(_first_state(whole.kv), _first_state(parts.kv), strict=True):
            if (state - other).norm() > 0.01 * state.norm():
                return False
        return self.agree(expected, found)

    def agree(self, expected: torch.Tensor, found: torch.Tensor) -> bool:
        """Whether two logits differ by no more than rounding."""
        scale = float(expected.max() - expected.min()) or 1.0
        return float((expected - found).abs().max()) <= AGREEMENT[self.model.dtype] * scale


def _first_state(cache: Any) -> list[torch.Tensor]:
    """The recurrent state of the first layer that has one: it depends on the tokens only, so that it hardly rounds."""
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None)
        if states:
            return [state.float() for state in states.values() if state is not None]
    return []
