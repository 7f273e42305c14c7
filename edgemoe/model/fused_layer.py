"""Decoder layers whose norms, residual and MoE block are steps of their attention's program, for few tokens.

A layer is one only where this gives the bits of its own forward, and its block is one where `RoutedBlock` finds it so.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from edgemoe.errors import is_device_or_memory_error
from edgemoe.experts.routed_block import RoutedBlock
from edgemoe.kernels.cpu.threads import torch_threads
from edgemoe.kernels.rms_norm import arithmetic_of
from edgemoe.model.fused_attention import FusedAttention, fused_of
from edgemoe.model.kv_cache import SequenceCache

if TYPE_CHECKING:
    from edgemoe.model.prepared_attention import LayerNorms

NAMES = ("input_layernorm", "self_attn", "post_attention_layernorm")
"""The children of a layer that are steps; the fourth one is its feed-forward network."""
PROBES = (1, 3, 1)
"""Tokens of the passes that a layer is tried with, one after the other."""


class FusedLayer(NamedTuple):
    """A decoder layer: x + attention(norm(x)), to which the network's output for its norm is added."""

    attention: FusedAttention
    norms: LayerNorms
    network: str
    """The name of the child."""
    block: RoutedBlock | None
    """The same as steps, where it can be."""

    @classmethod
    def of(cls, module: nn.Module) -> FusedLayer | None:
        """That of `module`; None where it has other children, or one that is no step."""
        children = dict(module.named_children())
        others = [name for name in children if name not in NAMES]
        if len(others) != 1 or len(children) != len(NAMES) + 1 or list(module.parameters(recurse=False)):
            return None
        before, attention, after = (children[name] for name in NAMES)
        fused, first, last = fused_of(attention), arithmetic_of(before), arithmetic_of(after)
        if fused is None or first is None or last is None:
            return None
        if not len(first.weight) == len(last.weight) == fused.parts.hidden:
            return None
        # Imported late: importing numba is slow.
        from edgemoe.model.prepared_attention import LayerNorms

        return cls(fused, LayerNorms(first, last), others[0], RoutedBlock.of(children[others[0]]))

    def fits(self, hidden: torch.Tensor, position_embeddings: Any) -> bool:
        """Whether a pass with these is one for the program."""
        return self.attention.fits(hidden, position_embeddings) and self.attention.is_prepared(hidden)

    def run(
        self, module: nn.Module, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The layer's output for `hidden`, [1, tokens, hidden size], valid until the next pass.

        Appends to the sequence's KV cache.
        """
        following = None if self.block is None or not self.block.fits() else self.block.after_attention(hidden.shape[1])
        residual, normed = self.attention.run_layer(hidden, position_embeddings, self.norms, following)
        if following is not None:
            return following.output(residual, normed)[None]
        # The next token writes over it, and what a network is given may be kept.
        output: torch.Tensor = residual[None] + getattr(module, self.network)(normed.clone()[None])
        return output


def install(model: nn.Module) -> None:
    """Replaces the forward of each decoder layer of `model` that can be fused, after that of its attention."""
    tried: dict[object, bool] = {}
    for module in model.modules():
        fused = FusedLayer.of(module)
        if fused is None:
            continue
        # Layers of one class and network differ in their weights alone.
        parts = fused.attention.parts
        kind = type(module), type(getattr(module, fused.network)), parts.queries, parts.keys, parts.width, parts.hidden
        if kind not in tried:
            tried[kind] = _agrees(model, module, fused._replace(block=None))
        if tried[kind]:
            vars(module)["forward"] = types.MethodType(_forward(module.forward, fused), module)


def _forward(other: Any, fused: FusedLayer) -> Any:
    def forward(
        module: nn.Module, hidden_states: torch.Tensor, *others: Any, position_embeddings: Any = None, **named: Any
    ) -> Any:
        if others or not fused.fits(hidden_states, position_embeddings):
            return other(hidden_states, *others, position_embeddings=position_embeddings, **named)
        return fused.run(module, hidden_states, position_embeddings)

    return forward


def _agrees(model: Any, module: Any, fused: FusedLayer) -> bool:
    """Whether `fused` gives the bits of the layer's own forward, around a network that only takes hidden states."""
    packed = fused.attention.packed
    generator = torch.Generator().manual_seed(0)
    caches = [SequenceCache.empty(model, sum(PROBES)).kv for _ in range(2)]
    network = vars(getattr(module, fused.network))
    before = network.get("forward")
    network["forward"] = _network
    try:
        with torch.inference_mode(), torch_threads(1):
            for tokens in PROBES:
                hidden, turning = fused.attention.random_inputs(tokens, model.dtype, generator)
                with packed.running_alone(caches[0], tokens):
                    expected = module.forward(hidden, position_embeddings=turning, attention_mask=None)
                with packed.running_alone(caches[1], tokens):
                    if not fused.fits(hidden, turning):
                        return False
                    found = fused.run(module, hidden, turning)
                if not isinstance(expected, torch.Tensor) or not torch.equal(expected, found):
                    return False
    except Exception as error:
        if is_device_or_memory_error(error):
            raise
        # The family's forward was not written for such a call.
        return False
    finally:
        if before is None:
            del network["forward"]
        else:
            network["forward"] = before
    return True


def _network(hidden: torch.Tensor) -> torch.Tensor:
    """Stands in for a layer's network while the layer is tried: what comes out differs for every value."""
    return torch.sin(3 * hidden) - hidden
