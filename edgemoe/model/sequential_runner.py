"""Passes over one sequence at a time: the plain form of all runners. Knows token ids and logits, no text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgemoe.cache import accelerator
from edgemoe.experts.expert_layer import ExpertLayers
from edgemoe.kernels import batch_invariant_linear
from edgemoe.kernels.cpu.kernel_choice import few_tokens
from edgemoe.kernels.cpu.threads import KernelThreads, torch_threads
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS
from edgemoe.model.draft_tree import TreeMask, additive_mask
from edgemoe.model.kv_cache import SequenceCache, cache_argument, has_recurrent_state
from edgemoe.model.packed_attention import MIN_THREADED_PAIRS
from edgemoe.model.pass_logits import LogitsRows, on_host, split_rows
from edgemoe.quiet import quiet_transformers

if TYPE_CHECKING:
    from edgemoe.model.pass_graph import DevicePasses

ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What attention runs on, on a CUDA device."""
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""How far logits may differ, relative to their spread, for two ways of computing the same thing."""

MIN_THREADED_WORK = 2 << 30
"""Tokens times weight bytes per token from which a pass runs on several of PyTorch's threads.

Threads that share less work mostly wait for each other, and for long where other programs run on the cores.
"""

PROBE_TOKENS = 8
"""Number of tokens that a probe runs in two ways to see whether they agree."""


class PassInput(NamedTuple):
    """Tokens to append to one sequence in a pass."""

    cache: SequenceCache
    tokens: Sequence[int]
    every: bool = False
    """Whether the pass returns the logits of all tokens, [tokens, vocabulary], or of the last one, [vocabulary]."""
    tree_mask: TreeMask | None = None
    """The tokens as nodes of a draft tree; None where each follows the one before it."""
    verifies: bool = False
    """Whether the logits verify drafts."""

    @property
    def outputs(self) -> int:
        """Number of tokens whose logits the pass returns."""
        return len(self.tokens) if self.every else 1

    @property
    def pairs(self) -> int:
        """Number of the pairs of a token and a cached or new one, each of which may attend to the other."""
        return len(self.tokens) * (self.cache.tokens + len(self.tokens))

    @property
    def positions(self) -> Sequence[int]:
        """The positions of the tokens in their sequence."""
        if self.tree_mask is not None:
            return self.tree_mask.positions
        return range(self.cache.tokens, self.cache.tokens + len(self.tokens))


class Counted(Protocol):
    """What the context of a pass needs to know of an input."""

    @property
    def tokens(self) -> Sequence[int]:
        """See `PassInput`."""
        ...

    @property
    def pairs(self) -> int:
        """See `PassInput`."""
        ...


class SequentialRunner:
    """Runs one model, one sequence a pass. All state is in the sequences' caches, of which any number may exist."""

    def __init__(
        self,
        model: Any,
        layers: ExpertLayers,
        device: torch.device,
        prefill_chunk: int,
        threads: int,
        nbytes_per_token: int,
        expert_share: float = 1.0,
        kernel_tokens: int | None = None,
        kernel_threads: KernelThreads | None = None,
        device_passes: DevicePasses | None = None,
    ) -> None:
        """`nbytes_per_token` are the weight bytes that a token multiplies. `kernel_threads` run attention's kernels;
        without them the caller does.

        `expert_share`, from 0 to 1, is the share of a layer's experts that a token uses. `kernel_tokens` are those up
        to which the CPU's kernels multiply most weights; None takes what holds for weights of the model's dtype.
        """
        self.model = model
        self.layers = layers
        self.device = device
        self.prefill_chunk = prefill_chunk
        self.threads = threads
        self.kernel_threads = kernel_threads or KernelThreads(1)
        self.device_passes = device_passes
        """What passes are captured with, on a device that can."""
        self._nbytes_per_token = nbytes_per_token
        self._expert_share = expert_share
        self._cache_argument = cache_argument(model)
        self.keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        if kernel_tokens is None:
            kernel_tokens = few_tokens(model.dtype)
        self._few_tokens = 0 if accelerator.is_accelerator(device) else kernel_tokens
        self._seen: set[object] = set()

    @property
    def vocabulary(self) -> int:
        """Number of tokens that logits are given for."""
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    def start(self, capacity: int) -> SequenceCache:
        """The KV cache of a new sequence, with buffers for `capacity` tokens. The caller owns it."""
        return SequenceCache.empty(self.model, capacity)

    def step(self, sequence: SequenceCache, tokens: Sequence[int]) -> torch.Tensor:
        """Appends `tokens` to `sequence` and returns the last one's logits, float32 [vocabulary] on the CPU."""
        return self.run([PassInput(sequence, tokens)])[0]

    def run(self, inputs: Sequence[PassInput]) -> list[torch.Tensor]:
        """Runs `inputs` one after the other, appending to their caches.

        Returns each one's last logits, float32 [vocabulary] on the CPU, or those of all its tokens where `every`.
        """
        return whole_logits(inputs, self.rows(inputs))

    def rows(self, inputs: Sequence[PassInput]) -> list[LogitsRows]:
        """As `run`, with the logits of every input as rows, one or one a token; those of a device are not read yet."""
        results: list[LogitsRows] = []
        for item in inputs:
            with self.passing([item], kind=(len(item.tokens) > 1, item.tree_mask is None)):
                results += split_rows(self.forward(item), [item.outputs])
        return results

    def forward(self, inputs: PassInput) -> torch.Tensor:
        """The pass of `run` for one input, for callers that are already inside of `passing`.

        Returns [outputs, vocabulary], on the device and in the dtype of the model.
        """
        sequence = inputs.cache
        ids = torch.tensor([list(inputs.tokens)]).to(self.device, non_blocking=True)
        extra: dict[str, Any] = {"logits_to_keep": inputs.outputs} if self.keeps_last else {}
        if inputs.tree_mask is not None:
            extra["position_ids"] = torch.tensor([list(inputs.positions)]).to(self.device, non_blocking=True)
            extra["attention_mask"] = self._masks(sequence, inputs.tree_mask)
        extra[self._cache_argument] = sequence.kv
        output = self.model(input_ids=ids, use_cache=True, **extra)
        sequence.kv = getattr(output, self._cache_argument)
        sequence.appended(len(inputs.tokens))
        return output.logits[0, -inputs.outputs :]  # type: ignore[no-any-return]

    def _masks(self, sequence: SequenceCache, tree_mask: TreeMask) -> Any:
        """A 4-D mask, or one for each kind of attention where the model has several, [1, 1, tokens, keys]."""
        text = self.model.config.get_text_config(decoder=True)
        layers = sequence.kv.layers
        kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * len(layers))
        masks = {}
        for kind, layer in zip(kinds, layers, strict=False):
            if kind in masks:
                continue
            masks[kind] = self.layer_mask(layer, tree_mask)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def layer_mask(self, layer: Any, tree_mask: TreeMask) -> torch.Tensor:
        """The 4-D mask of a pass for one layer of a KV cache, [1, 1, tokens, keys], added to the scores."""
        keys, _ = layer.get_mask_sizes(len(tree_mask.ancestors))
        window = layer.sliding_window if layer.is_sliding else None
        visible = tree_mask.visible(keys, window).to(self.device, non_blocking=True)
        return additive_mask(visible, self.model.dtype)[None, None]

    @contextmanager
    def passing(self, inputs: Sequence[Counted], *, kind: object) -> Iterator[None]:
        """The context of every pass: no gradients, the number of PyTorch's threads that pays, no messages.

        transformers names its fallbacks in the first pass of each `kind`; that pass is silenced.
        """
        tokens = sum(len(item.tokens) for item in inputs)
        pairs = sum(item.pairs for item in inputs)
        small = tokens * self._nbytes_per_token < MIN_THREADED_WORK and pairs < MIN_THREADED_PAIRS
        # PyTorch's threads spin after an operation, on the cores that kernel threads would run on next: only one of
        # the two kinds gets the cores of a pass.
        few = tokens <= self._few_tokens or self._spread_thin(tokens)
        # A device leaves the CPU so little to do that starting and joining threads costs more than all of it.
        alone = small or few or accelerator.is_accelerator(self.device)
        quiet = nullcontext() if kind in self._seen else quiet_transformers()
        self._seen.add(kind)
        threads = torch_threads(1 if alone else self.threads)
        with torch.inference_mode(), threads, _attention_kernels(self.device), quiet:
            yield

    def batch_invariant(self, inputs: Sequence[PassInput]) -> bool:
        """Whether short inputs of a pass get the bits of single steps: where kernels multiply all of it, on a CPU.

        Where PyTorch's products of many tokens are faster than kernels they are taken, whose bits differ; and on GPUs a
        loop over the tokens would cost more than it is worth.
        """
        return 1 < sum(len(item.tokens) for item in inputs) <= self.batch_invariant_tokens

    @cached_property
    def batch_invariant_tokens(self) -> int:
        """Most tokens of a pass that is `batch_invariant`; 0 on GPUs."""
        if accelerator.is_accelerator(self.device):
            return 0
        return batch_invariant_linear.batch_invariant_tokens(self.model, max(BATCH_INVARIANT_TOKENS, self._few_tokens))

    def _spread_thin(self, tokens: int) -> bool:
        """Whether each expert gets so few of `tokens` that kernels gain more on experts than they lose elsewhere."""
        return tokens <= 4 * self._few_tokens and tokens * self._expert_share <= self._few_tokens / 4

    @property
    def bulk_from(self) -> int:
        """Number of tokens from which a pass uses PyTorch's products, not kernels; 0 where there are no kernels."""
        if not self._few_tokens:
            return 0
        thin = min(4 * self._few_tokens, int(self._few_tokens / 4 / self._expert_share))
        return max(self._few_tokens, thin, (MIN_THREADED_WORK - 1) // self._nbytes_per_token) + 1

    @cached_property
    def can_chunk(self) -> bool:
        """Whether a prompt may be run in parts; probed once, without experts.

        Keys and values always allow it. Some families with a recurrent state extend it by one token only, and show
        it by a wrong result, so a few tokens are run both ways and compared.
        """
        return not has_recurrent_state(self.start(1).kv) or self._chunks_agree()

    def _chunks_agree(self) -> bool:
        tokens = [(17 * place + 3) % self.vocabulary for place in range(PROBE_TOKENS)]
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


def whole_logits(inputs: Sequence[PassInput], rows: Sequence[LogitsRows]) -> list[torch.Tensor]:
    """What `SequentialRunner.run` returns for `inputs`, of the `rows` of each."""
    return [on_host(each if item.every else each[-1]) for item, each in zip(inputs, rows, strict=True)]


def _attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """PyTorch's attention without cuDNN's on a CUDA device.

    cuDNN makes a plan for every new number of keys, 10 ms a layer on an H200, and a sequence grows by every step.
    """
    return sdpa_kernel(ATTENTION_KERNELS) if accelerator.is_accelerator(device) else nullcontext()


def _first_state(cache: Any) -> list[torch.Tensor]:
    """The recurrent state of the first layer that has one: only tokens and weights enter it, so rounding is small."""
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None)
        if states:
            return [state.float() for state in states.values() if state is not None]
    return []
