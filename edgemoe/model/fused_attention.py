"""The attention module of a layer as one program: projections, norms, rotary position embedding, KV cache, attention.

In PyTorch these are seven modules and some fifty operations, which for one token take longer than its products. A
module is fused only where its program gives the bits of its own forward.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from edgemoe.checkpoint.draft_head import HEAD, of_head
from edgemoe.errors import is_device_or_memory_error
from edgemoe.kernels.batch_invariant_linear import matrix_of
from edgemoe.kernels.cpu.arrays import Groups, Job, address
from edgemoe.kernels.cpu.attention import DTYPES, REGISTER, SeenKeys, attention_step
from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores, torch_threads
from edgemoe.kernels.rms_norm import NormArithmetic, arithmetic_of
from edgemoe.kernels.rows import scattered, widened
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.row_layers import GrowingLayer

if TYPE_CHECKING:
    from edgemoe.experts.routed_block import AfterAttention
    from edgemoe.kernels.cpu.program import Step
    from edgemoe.model.packed_attention import PackedAttention, Row
    from edgemoe.model.prepared_attention import LayerNorms, PassJobs, PreparedAttention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
_ATTRIBUTE = "edgemoe_fused_attention"
PREPARED_TOKENS = 4
"""Tokens of a pass up to which its program is kept, as most verifications have: each number has memory of its own."""
PROBES = (1, 3)
"""Tokens of the passes that a module is tried with, one after the other."""


class _Parts(NamedTuple):
    """What an attention module of the usual form consists of."""

    matrices: Sequence[SlotMatrix | PackedMatrix]
    """Of the `PROJECTIONS`."""
    biases: Sequence[torch.Tensor | None]
    """Float32, of queries, keys and values."""
    norms: Sequence[NormArithmetic | None]
    """Of a head of queries, and of keys."""
    queries: int
    keys: int
    """Heads."""
    width: int
    hidden: int
    scaling: float | None

    @classmethod
    def of(cls, module: nn.Module) -> _Parts | None:
        """Those of `module`; None where it has others, or one without a kernel."""
        children: dict[str, Any] = dict(module.named_children())
        width = getattr(module, "head_dim", None)
        usual = set(PROJECTIONS) <= set(children) <= {*PROJECTIONS, *NORMS} and children["o_proj"].bias is None
        if not usual or list(module.parameters(recurse=False)) or not isinstance(width, int) or width % REGISTER:
            return None
        matrices = [each for name in PROJECTIONS if (each := matrix_of(children[name])) and not each.interleaved]
        norms = [arithmetic_of(children[name]) if name in children else None for name in NORMS]
        known = [norm for norm in norms if norm is not None and len(norm.weight) == width]
        if len(matrices) < len(PROJECTIONS) or len(known) + len(PROJECTIONS) < len(children):
            return None
        *rows, hidden = (int(children[name].out_features) for name in PROJECTIONS)
        queries, keys, values = (count // width for count in rows)
        whole = keys == values and all(count % width == 0 for count in rows) and queries % keys == 0
        if not whole or len({norm.rounds for norm in known}) > 1:
            return None
        added = [children[name].bias for name in PROJECTIONS[:3]]
        biases = [None if bias is None else bias.detach().float() for bias in added]
        return cls(matrices, biases, norms, queries, keys, width, hidden, getattr(module, "scaling", None))


class FusedAttention:
    """The program of one attention module."""

    def __init__(self, packed: PackedAttention, parts: _Parts, threads: KernelThreads, layer: int) -> None:
        self.packed = packed
        self.parts = parts
        self._threads = threads
        self._layer = layer
        self._max_tokens = min(matrix.max_tokens for matrix in parts.matrices)
        self._kept: dict[object, tuple[AfterAttention | None, PreparedAttention]] = {}

    def fits(self, hidden: torch.Tensor, position_embeddings: Any) -> bool:
        """Whether a pass with these is one for the program."""
        if not isinstance(position_embeddings, tuple) or not kernels_have_the_cores(self._threads):
            return False
        rows = self.packed.rows
        if not rows or hidden.dim() != 3 or not hidden.shape[1] == rows[-1].last <= self._max_tokens:
            return False
        factors = [each for each in position_embeddings if isinstance(each, torch.Tensor)]
        tokens, width = hidden.shape[1], self.parts.width
        last = self.parts.matrices[3].inputs
        rotating = (
            last in (hidden.dtype, torch.float32)
            and len(factors) == 2
            and all(
                each.dtype is hidden.dtype and each.shape[:-1] == (1, tokens) and 0 < each.shape[-1] <= width
                for each in factors
            )
        )
        return rotating and hidden.dtype in DTYPES and all(self._takes(row) for row in rows)

    def _takes(self, row: Row) -> bool:
        return type(row.kv.layers[self._layer]) is GrowingLayer and (row.batch_invariant or row.last - row.first == 1)

    def run(self, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The module's output for `hidden`, [1, tokens, hidden size]. Appends to the KV cache of every row."""
        rows = self.packed.rows
        if self.is_prepared(hidden):
            return self._prepared(hidden, position_embeddings).output()
        tokens = hidden.shape[1]
        query = hidden.new_empty(tokens, self.parts.queries, self.parts.width)
        caches = self._extend(query)
        seen = [self.packed.seen_keys(row, keys.shape[-2], None) for row, (keys, _) in zip(rows, caches, strict=True)]
        steps, _, result = self._steps(self._inputs(hidden), query, caches, seen, position_embeddings)
        self._threads.run(steps)
        return result.view(hidden.shape)

    def random_inputs(
        self, tokens: int, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states and position embeddings of a pass that a module is tried with."""
        hidden = torch.randn(1, tokens, self.parts.hidden, generator=generator).to(dtype)
        angles = torch.randn(1, tokens, self.parts.width // 2, generator=generator).repeat(1, 1, 2)
        return hidden, (angles.cos().to(dtype), angles.sin().to(dtype))

    def is_prepared(self, hidden: torch.Tensor) -> bool:
        """Whether a pass with `hidden` is one for a program that is made once: of few tokens of one sequence."""
        return hidden.shape[1] <= PREPARED_TOKENS and len(self.packed.rows) == 1

    def run_layer(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        norms: LayerNorms,
        following: AfterAttention | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run` where `is_prepared`, with the `norms` of its layer: the residual after it, and its norm.

        Both are [tokens, hidden size], and valid until the next pass. The program ends with the steps of `following`.
        """
        return self._prepared(hidden, position_embeddings, norms, following).outputs()

    def _prepared(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        norms: LayerNorms | None = None,
        following: AfterAttention | None = None,
    ) -> PreparedAttention:
        """The program of so many tokens, which has run. It is made once, and again when its keys need more room."""
        row, tokens = self.packed.rows[0], hidden.shape[1]
        reads_slots = following is not None and following.slots is not None
        key = tokens, hidden.dtype, position_embeddings[0].shape[-1], norms is None, following is None, reads_slots
        continued, prepared = self._kept.get(key, (None, None))
        if continued is not following:
            # The slots are others since the cache was resized.
            prepared = None
        like = hidden.new_empty(1, self.parts.keys, tokens, self.parts.width) if prepared is None else prepared.like
        layer = row.kv.layers[self._layer]
        assert isinstance(layer, GrowingLayer)
        cache = layer.extend(like, like)
        count = cache[0].shape[-2]
        if prepared is None or count > prepared.most:
            # Later passes may write to its memory in another mode than this one's.
            with torch.inference_mode(False):
                prepared = self._prepare(hidden, count * 2, position_embeddings, norms, following)
            self._kept[key] = following, prepared
        prepared.run(hidden, cache, self.packed.seen_keys(row, count, None), position_embeddings)
        return prepared

    def _prepare(
        self,
        hidden: torch.Tensor,
        most: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        norms: LayerNorms | None,
        following: AfterAttention | None,
    ) -> PreparedAttention:
        # Imported late: importing numba is slow.
        from edgemoe.model.prepared_attention import LayerProgram, PreparedAttention

        parts, tokens = self.parts, hidden.shape[1]
        like = torch.empty(1, parts.keys, tokens, parts.width, dtype=hidden.dtype)
        query = torch.empty(tokens, parts.queries, parts.width, dtype=hidden.dtype)
        keys = like[:, :, :1].expand(-1, -1, max(most, tokens), -1)
        seen = SeenKeys.ranges([(0, most)] * tokens)
        layer = None if norms is None else LayerProgram(norms, following, tokens, hidden.dtype)
        inputs = self._inputs(torch.empty_like(hidden)) if layer is None else layer.inputs(self._dtypes)
        turning = tuple(torch.empty_like(each) for each in position_embeddings)
        steps, jobs, result = self._steps(inputs, query, [(keys, keys)], [seen], turning)
        program = self._threads.program(steps if layer is None else layer.around(steps, result))
        return PreparedAttention(program, layer or list(inputs.values()), like, most, jobs, result)

    @property
    def _dtypes(self) -> set[torch.dtype]:
        """Of what the first three matrices multiply."""
        return {matrix.inputs for matrix in self.parts.matrices[:3]}

    def _inputs(self, hidden: torch.Tensor) -> dict[torch.dtype, torch.Tensor]:
        flat = hidden.reshape(hidden.shape[1], -1)
        return {dtype: flat.to(dtype).contiguous() for dtype in self._dtypes}

    def _steps(
        self,
        inputs: dict[torch.dtype, torch.Tensor],
        query: torch.Tensor,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        seen: Sequence[SeenKeys],
        position_embeddings: tuple[torch.Tensor, ...],
    ) -> tuple[list[Step], PassJobs, torch.Tensor]:
        """The steps of a pass, the jobs among them that differ between passes, and where the output will be.

        That is [tokens, hidden size]. `query` is where rotated queries are put, [tokens, heads, width]; `caches` and
        `seen` are each row's.
        """
        # Imported late: importing numba is slow.
        from edgemoe.model.prepared_attention import PassJobs

        parts, tokens = self.parts, len(query)
        every, steps, products = Groups.of_one(tokens), [], []
        for matrix in parts.matrices[:3]:
            product, own = matrix.product(every, inputs[matrix.inputs])
            products.append(product)
            steps += own
        places = self._places(caches)
        heads = self._heads(products, query, caches, places, position_embeddings)
        out = torch.empty_like(query)
        attending = [
            attention_step(
                query[None, row.first : row.last].transpose(1, 2), *cache, own, parts.scaling,
                out[None, row.first : row.last],
            )
            for row, cache, own in zip(self.packed.rows, caches, seen, strict=True)
        ]  # fmt: skip
        matrix = parts.matrices[3]
        x, widening = (out.view(tokens, -1), []) if matrix.inputs is out.dtype else widened(out.view(tokens, -1))
        product, multiplying = matrix.product(every, x)
        result = query.new_empty(tokens, parts.hidden)
        steps += [heads, *attending, *widening, *multiplying, *scattered(product, range(tokens), result)]
        return steps, PassJobs(heads.job, places, attending[0].job), result

    def _extend(self, query: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All keys and values of each row, of which the new ones are not written yet."""
        found = []
        for row in self.packed.rows:
            like = query.new_empty(1, self.parts.keys, row.last - row.first, self.parts.width)
            layer = row.kv.layers[self._layer]
            assert isinstance(layer, GrowingLayer)
            found.append(layer.extend(like, like))
        return found

    def _heads(
        self,
        products: Sequence[torch.Tensor],
        query: torch.Tensor,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        places: Any,
        position_embeddings: tuple[torch.Tensor, ...],
    ) -> Step:
        """The step from `products` to `query` and to the new rows of the KV caches, which are at `places`."""
        # Imported late: importing numba is slow.
        from edgemoe.kernels.cpu.head_kernels import heads_bf16, heads_f32
        from edgemoe.kernels.cpu.program import Step

        parts, (tokens, queries, width) = self.parts, query.shape
        cosines, sines = (each.contiguous() for each in position_embeddings)
        size = query.element_size()
        rounds = any(norm.rounds for norm in parts.norms if norm is not None)
        words = [
            address(places), queries, parts.keys, width, width, query.data_ptr(), width * size,
            cosines.shape[-1], cosines.data_ptr(), sines.data_ptr(), int(rounds),
        ]  # fmt: skip
        for product, bias, norm in zip(products, parts.biases, (*parts.norms, None), strict=True):
            words += [product.data_ptr(), 4 * product.stride(0), 0 if bias is None else bias.data_ptr()]
            words += [0, 0] if norm is None else [norm.weight.data_ptr(), norm.epsilon]
        job = Job(words, (products, query, caches, cosines, sines, places, parts))
        kernel = heads_bf16 if query.dtype is torch.bfloat16 else heads_f32
        heads = queries + 2 * parts.keys
        return Step(kernel, job, tokens * heads, 4 * tokens * heads * width, scratch_nbytes=2 * width * size)

    def _places(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Where each token's keys and values go, int64 [tokens, 4]: see `head_kernels.PLACE`."""
        # Imported late: importing numba is slow.
        from edgemoe.model.prepared_attention import places_of

        both = zip(self.packed.rows, caches, strict=True)
        return np.array([token for row, kept in both for token in places_of(kept, row.last - row.first)], np.int64)


def install(model: nn.Module, packed: PackedAttention, threads: KernelThreads) -> None:
    """Replaces the forward of each attention module of `model` that can be fused, for passes of few tokens on a CPU."""
    tried: dict[object, bool] = {}
    layers = SequenceCache.empty(model, 1).kv.layers
    head = getattr(model, HEAD, None)
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        # A head's layers count for themselves.
        like = head.like[layer] if head is not None and layer is not None and of_head(name) else layer
        grows = isinstance(like, int) and like < len(layers) and type(layers[like]) is GrowingLayer
        parts = _Parts.of(module) if grows and packed.is_plain(module) else None
        if parts is None or not isinstance(layer, int):
            continue
        fused = FusedAttention(packed, parts, threads, layer)
        # Modules of one class and shape differ in their weights alone.
        kind = (type(module), parts.queries, parts.keys, parts.width, parts.hidden, parts.scaling)
        if kind not in tried:
            tried[kind] = _agrees(model, module, fused)
        if tried[kind]:
            vars(module)["forward"] = types.MethodType(_forward(module.forward, fused), module)
            vars(module)[_ATTRIBUTE] = fused


def fused_of(module: nn.Module) -> FusedAttention | None:
    """The program of an attention module, where `install` has found that it can be one."""
    found: FusedAttention | None = vars(module).get(_ATTRIBUTE)
    return found


def _forward(other: Any, fused: FusedAttention) -> Any:
    def forward(
        module: nn.Module, hidden_states: torch.Tensor, *others: Any, position_embeddings: Any = None, **named: Any
    ) -> Any:
        if others or not fused.fits(hidden_states, position_embeddings):
            return other(hidden_states, *others, position_embeddings=position_embeddings, **named)
        return fused.run(hidden_states, position_embeddings), None

    return forward


def _agrees(model: Any, module: Any, fused: FusedAttention) -> bool:
    """Whether `fused` gives the bits of the module's own forward, for a token and for several after it."""
    packed, dtype = fused.packed, model.dtype
    generator = torch.Generator().manual_seed(0)
    caches = [SequenceCache.empty(model, sum(PROBES)).kv for _ in range(2)]
    with torch.inference_mode(), torch_threads(1):
        for tokens in PROBES:
            hidden, turning = fused.random_inputs(tokens, dtype, generator)
            try:
                with packed.running_alone(caches[0], tokens):
                    expected = module.forward(hidden, position_embeddings=turning, attention_mask=None)
                with packed.running_alone(caches[1], tokens):
                    if not fused.fits(hidden, turning):
                        return False
                    found = fused.run(hidden, turning)
            except Exception as error:
                if is_device_or_memory_error(error):
                    raise
                # The family's forward was not written for such a call.
                return False
            if len(expected) != 2 or not torch.equal(expected[0], found):
                return False
    return True
