"""A checkpoint's own draft head (multi-token prediction): found by its tensors, and built of the family's layers.

A head predicts the token after the next one from the model's last hidden state and the embedding of the next token:
two norms, a projection of both, one layer like the model's own, and a norm (DeepSeek-V3, arXiv 2412.19437, section
2.2). Checkpoints have it as layers after the last one (`model.layers.61.eh_proj`), or apart (`mtp.fc`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edgemoe.checkpoint.checkpoint import Checkpoint
from edgemoe.checkpoint.packed.packed_tensor import Weight
from edgemoe.checkpoint.tensor_entry import TensorEntry

HEAD = "draft_head"
"""The head's place in a model, and the first part of its tensors' names."""
LAYER = re.compile(r"^(.*\blayers\.)(\d+)\.(.+)$")
APART = re.compile(r"^(?:.*\.)?(mtp\w*)\.(?:layers\.)?(?:(\d+)\.)?(.+)$")
"""A tensor of heads apart: what they are called there, the number of the head, and the tensor's own name."""
WRAPPERS = ("transformer_block.", "mtp_block.")
"""What some formats put before the names of a head's layer."""
ROLES = {
    "enorm": "enorm", "pre_fc_norm_embedding": "enorm", "mtp_emb_norm": "enorm",
    "hnorm": "hnorm", "pre_fc_norm_hidden": "hnorm", "mtp_hidden_norm": "hnorm",
    "eh_proj": "eh_proj", "fc": "eh_proj", "mtp_linear_proj": "eh_proj",
    "shared_head.norm": "norm", "final_layernorm": "norm", "post_norm": "norm", "norm": "norm",
    "embed_tokens": "embedding", "shared_head.head": "output",
}  # fmt: skip
"""What the parts of a head beside its layer are called, and what they are."""
NEEDED = ("enorm", "hnorm", "eh_proj")
DECLARED = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
"""The names under which configurations give the number of heads."""
SAMPLES, SAMPLE_NBYTES = 16, 4096
"""Parts of two tensors that are compared to see whether they are the same."""

Names = dict[str, tuple[int, ...]]
"""The tensors of a layer with their shapes; experts' numbers are left out."""


@dataclass(frozen=True)
class HeadShape:
    """What a model's head is made of."""

    layers: tuple[int, ...]
    """For each of its layers the number of a layer of the model that is built alike."""
    has_norm: bool
    """Whether it has a norm of its own after the last layer; else the model's is used."""
    has_embedding: bool
    """Whether it has an embedding of its own; else the model's is used."""
    has_output: bool
    """Whether it has an output layer of its own; else the model's is used."""


@dataclass(frozen=True)
class FoundHead:
    """A checkpoint, and what was found of a head in it."""

    checkpoint: Checkpoint
    """Without any heads; where one can be used, its tensors begin with `HEAD`."""
    shape: HeadShape | None = None
    refusal: str = ""
    """Why a head that is there is not used; empty where there is none, or it is used."""


def find_head(checkpoint: Checkpoint, config: Any, *, wanted: bool) -> FoundHead:
    """Takes the heads out of `checkpoint`, and the first one in again where it is `wanted` and can be run.

    `config` is a text configuration. A head is what stands after the last layer where the configuration has one, or
    where it has tensors that no other layer has. Layers like all others stay, which a wrong number of layers shows by.
    """
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return FoundHead(checkpoint)
    weights = checkpoint.weights
    stacks = _stacks(weights)
    main = _main_stack(stacks, count)
    if main is None:
        return FoundHead(checkpoint)
    declared = max(int(getattr(config, name, None) or 0) for name in DECLARED)
    places = _places(weights, main, stacks[main], count, declared)
    if not places:
        return FoundHead(checkpoint)
    bare = _without(checkpoint, places)
    if not wanted:
        return FoundHead(bare)
    found = _assembled(weights, places, [stacks[main][layer] for layer in range(count)])
    if isinstance(found, str):
        return FoundHead(bare, refusal=found)
    names, layers = found
    prefix = main.removesuffix("layers.")
    for role, owner in (("embedding", f"{prefix}embed_tokens.weight"), ("output", "lm_head.weight")):
        key = names.get(f"{role}.weight")
        if key is not None and _same(checkpoint, key, owner):
            del names[f"{role}.weight"]
    own = {role: f"{role}.weight" in names for role in ("norm", "embedding", "output")}
    added = {key: f"{HEAD}.{name}" for name, key in names.items()}
    tensors = {added[key]: entry for key, entry in checkpoint.tensors.items() if key in added}
    packed = {added[key]: weight for key, weight in checkpoint.packed.items() if key in added}
    whole = replace(bare, tensors={**bare.tensors, **tensors}, packed={**bare.packed, **packed})
    return FoundHead(whole, HeadShape(tuple(layers), own["norm"], own["embedding"], own["output"]))


class DraftHead(nn.Module):
    """The modules of a head. `HeadRunner` runs them."""

    def __init__(self, shape: HeadShape, decoder: Any, dtype: torch.dtype) -> None:
        """As `decoder`, a model's stack of layers, has them. On the device of the context, without values."""
        super().__init__()
        size = decoder.config.hidden_size
        self.like = shape.layers
        """For each of its layers the number of the model's layer that is built alike."""
        self.blocks = nn.ModuleList([copy.deepcopy(decoder.layers[layer]) for layer in shape.layers])
        for number, block in enumerate(self.blocks):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = number  # type: ignore[assignment]
        norm = _norm_of(decoder.layers[shape.layers[0]], size)
        self.enorm, self.hnorm = copy.deepcopy(norm), copy.deepcopy(norm)
        self.eh_proj = nn.Linear(2 * size, size, bias=False, dtype=dtype)
        self.norm = copy.deepcopy(norm) if shape.has_norm else None
        vocabulary = decoder.config.vocab_size
        self.embedding = nn.Embedding(vocabulary, size, dtype=dtype) if shape.has_embedding else None
        self.output = nn.Linear(size, vocabulary, bias=False, dtype=dtype) if shape.has_output else None
        for part in (self.eh_proj, self.embedding, self.output):
            if part is not None:
                # Its values come from the checkpoint.
                part._is_hf_initialized = True  # type: ignore[assignment]


def attach_head(model: Any, shape: HeadShape, dtype: torch.dtype) -> None:
    """Gives `model` the modules of a head, as `draft_head`. Its own passes do not run them.

    Raises LookupError where the model's layers have no norm like those of a head.
    """
    setattr(model, HEAD, DraftHead(shape, model.get_decoder(), dtype))


def of_head(name: str) -> bool:
    """Whether a tensor or module of a model, by its name, is its head's."""
    return name.startswith(f"{HEAD}.")


def _main_stack(stacks: Mapping[str, Mapping[int, Names]], count: int) -> str | None:
    """The prefix of the model's stack of `count` layers. Towers of other kinds have other numbers of layers."""
    found = [stack for stack, layers in stacks.items() if set(range(count)) <= set(layers) and "mtp" not in stack]
    return found[-1] if found else None


def _places(
    weights: Iterable[str], main: str, layers: Mapping[int, Names], count: int, declared: int
) -> dict[str, tuple[int, str]]:
    """The place of each tensor of heads: the number of its head and its own name there.

    `layers` are those of the model's stack, whose prefix is `main`, with what comes after the first `count`.
    """
    ordinary = {name for layer in range(count) for name in layers[layer]}
    heads = {
        layer
        for layer, names in layers.items()
        if layer >= count and (layer < count + declared or not names.keys() <= ordinary)
    }
    if heads:
        matches = ((key, LAYER.match(key)) for key in weights)
        own = ((key, match) for key, match in matches if match is not None and match[1] == main)
        return {key: (int(match[2]) - count, match[3]) for key, match in own if int(match[2]) in heads}
    matches = ((key, APART.match(key)) for key in weights)
    apart = {key: (int(match[2] or 0), _own_name(match)) for key, match in matches if match is not None}
    # Other tensors may be called so, too.
    return apart if any(_role(name) == "eh_proj" for _, name in apart.values()) else {}


def _own_name(match: re.Match[str]) -> str:
    """The name of a tensor within its head: some formats have the part's name in place of the head's."""
    return f"{match[1]}.{match[3]}" if match[1] in ROLES else match[3]


def _role(name: str) -> str | None:
    return ROLES.get(name.removesuffix(".weight"))


def _without(checkpoint: Checkpoint, keys: Collection[str]) -> Checkpoint:
    tensors = {key: entry for key, entry in checkpoint.tensors.items() if key not in keys}
    packed = {key: weight for key, weight in checkpoint.packed.items() if key not in keys}
    return replace(checkpoint, tensors=tensors, packed=packed)


def _assembled(
    weights: Mapping[str, Weight], places: Mapping[str, tuple[int, str]], layers: list[Names]
) -> tuple[dict[str, str], list[int]] | str:
    """The first head: its tensors by their names in `DraftHead`, and the layers that its own are like. Or why not."""
    ordinary = {name for names in layers for name in names}
    parts: dict[str, str] = {}
    blocks: dict[int, dict[str, str]] = {}
    for key, (head, name) in places.items():
        role = None if _collapsed(name) in ordinary else _role(name)
        if role is None:
            for wrapper in WRAPPERS:
                name = name.removeprefix(wrapper)
            blocks.setdefault(head, {})[name] = key
        elif f"{role}.weight" not in parts or head == 0:
            parts[f"{role}.weight"] = key
    lacking = [role for role in NEEDED if f"{role}.weight" not in parts]
    if lacking:
        return f"its head has no {lacking[0]}"
    # A layer without a projection goes on where the one before it ended.
    begins = {head for head, name in places.values() if _role(name) == "eh_proj"}
    own = [head for head in sorted(blocks) if head == 0 or not any(0 < first <= head for first in begins)]
    chosen: list[int] = []
    for number, head in enumerate(own):
        names = {_collapsed(name): weights[key].shape for name, key in blocks[head].items()}
        alike = [layer for layer, other in enumerate(layers) if other == names and layer > max(chosen, default=-1)]
        if not alike:
            odd = sorted(names.keys() ^ layers[-1].keys()) or sorted(names)
            return f"its head's layer is like none of the model's ({odd[0]})"
        chosen.append(alike[-1] if number == len(own) - 1 else alike[0])
        parts |= {f"blocks.{number}.{name}": key for name, key in blocks[head].items()}
    return (parts, chosen) if chosen else "its head has no layer"


def _stacks(weights: Mapping[str, Weight]) -> dict[str, dict[int, Names]]:
    """For each stack of layers, by its prefix, each layer's tensors."""
    found: dict[str, dict[int, Names]] = {}
    for key, weight in weights.items():
        match = LAYER.match(key)
        if match is not None:
            names = found.setdefault(match[1], {}).setdefault(int(match[2]), {})
            names[_collapsed(match[3])] = tuple(weight.shape)
    return found


def _collapsed(name: str) -> str:
    return re.sub(r"\.\d+\.", ".", name)


def _norm_of(layer: nn.Module, size: int) -> nn.Module:
    """A norm of `layer` over values of `size`."""
    module: nn.Module
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        plain = getattr(module, "bias", None) is None
        if plain and "norm" in name and isinstance(weight, torch.Tensor) and tuple(weight.shape) == (size,):
            return module
    raise LookupError("its layers have no norm of a kind that a head has")


def _same(checkpoint: Checkpoint, key: str, other: str) -> bool:
    """Whether two tensors of a checkpoint have the same shape, format and values, as far as samples tell."""
    one, two = checkpoint.weights[key], checkpoint.weights.get(other)
    if two is None or type(one) is not type(two):
        # A shared embedding may have one name only.
        return two is None
    pairs = list(zip(_entries(one), _entries(two), strict=False))
    if any(first.shape != second.shape or first.dtype != second.dtype for first, second in pairs):
        return False
    return all(_sampled(checkpoint, first) == _sampled(checkpoint, second) for first, second in pairs)


def _entries(weight: Weight) -> Iterable[TensorEntry]:
    return [weight] if isinstance(weight, TensorEntry) else list(weight.stored.values())


def _sampled(checkpoint: Checkpoint, entry: TensorEntry) -> list[bytes]:
    step = max(1, (entry.nbytes - SAMPLE_NBYTES) // SAMPLES)
    with checkpoint.files[entry.file].open("rb") as file:
        found = []
        for start in range(0, max(1, entry.nbytes - SAMPLE_NBYTES + 1), step):
            file.seek(entry.offset + start)
            found.append(file.read(min(SAMPLE_NBYTES, entry.nbytes)))
        return found
