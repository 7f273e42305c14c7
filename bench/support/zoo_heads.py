"""Tiny checkpoints with draft heads: those of the zoo, with a layer more, of random values as all others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.support.zoo import make

LAYER = re.compile(r"^(.*\blayers\.)(\d+)\.(.+)$")
ROLES = {
    "appended": {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"},
    "apart": {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "norm": "norm"},
}
"""How the layouts of published checkpoints call the parts of a head: DeepSeek's and GLM's, and Qwen's."""
EFFECT, WIDENED = 0.3, 10.0
"""Of `imitating`: what layers add is scaled by the one, the output by the other."""


def make_with_head(
    family: str, folder: Path, *, layout: str = "appended", copies: bool = False, seed: int = 0, **overrides: Any
) -> Path:
    """As `zoo.make`, and the checkpoint has a head in `layout`, one of `ROLES`.

    `copies` adds the model's embedding and output under the head's names, as DeepSeek's checkpoints have them.
    """
    make(family, folder, seed=seed, **overrides)
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    tensors |= head_tensors(tensors, text, layout, seed=seed + 100, copies=copies)
    save_file(tensors, path, metadata=metadata)
    text["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def head_tensors(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], layout: str, *, seed: int, copies: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a head like the model's last layer that attends and has experts, of random values."""
    generator = torch.Generator().manual_seed(seed)
    stack, layer = _last_layer(tensors, config)
    own = f"{stack}{config['num_hidden_layers']}." if layout == "appended" else "mtp.layers.0."
    outside = own if layout == "appended" else "mtp."
    found = {}
    for key, value in tensors.items():
        if key.startswith(f"{stack}{layer}."):
            spread = value.std() if value.numel() > 1 else value.abs().mean()
            drawn = value + 0.1 * spread * torch.randn(value.shape, generator=generator)
            found[own + key.removeprefix(f"{stack}{layer}.")] = drawn.to(value.dtype)
    size = config["hidden_size"]
    like = next(value for key, value in tensors.items() if key.endswith("norm.weight"))
    for role, name in ROLES[layout].items():
        if role == "eh_proj":
            made = torch.randn(size, 2 * size, generator=generator) * 0.1
        else:
            made = like.mean() + 0.1 * torch.randn(size, generator=generator)
        found[f"{outside}{name}.weight"] = made.to(like.dtype)
    if copies:
        prefix = stack.removesuffix("layers.")
        found[f"{own}embed_tokens.weight"] = tensors[f"{prefix}embed_tokens.weight"].clone()
        found[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return found


def _last_layer(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[str, int]:
    """The prefix of the stack of layers, and the last layer of it that attends and has experts."""
    layers: dict[tuple[str, int], set[str]] = {}
    for key in tensors:
        match = LAYER.match(key)
        if match is not None:
            layers.setdefault((match[1], int(match[2])), set()).add(match[3])
    stack = max({prefix for prefix, _ in layers}, key=lambda prefix: sum(other == prefix for other, _ in layers))
    words = ("expert", "moe")
    chosen = [
        number
        for (prefix, number), names in layers.items()
        if prefix == stack
        and any("attn" in name for name in names)
        and any(word in name for name in names for word in words)
        if not any("linear_attn" in name or "conv" in name for name in names)
    ]
    if not chosen:
        raise ValueError("no layer attends and has experts, as the layer of a head does")
    return stack, max(chosen)


def imitating(folder: Path, *, effect: float = EFFECT) -> Path:
    """Changes a checkpoint of `make_with_head` so that its head is often right, and returns `folder`.

    What layers add is scaled by `effect`: with 0 the next token follows from the last one alone, and the head, which
    passes the embedding on, says exactly the same. Values of the last norm and the output are those of the model.
    """
    path = folder / "model.safetensors"
    tensors = load_file(path)
    text = json.loads((folder / "config.json").read_text())
    text = text.get("text_config", text)
    layer = re.compile(rf"\.layers\.{text['num_hidden_layers']}\.|^mtp\.")
    last = re.compile(r"^(model\.)?(language_model\.)?norm\.weight$")
    norm = next((value for key, value in tensors.items() if last.search(key)), None)
    size = text["hidden_size"]
    for key, value in tensors.items():
        head = layer.search(key) is not None
        if re.search(r"\.(o_proj|down_proj|w2)(\.|_bias|$)", key):
            tensors[key] = value * effect
        elif head and re.search(r"\.(eh_proj|fc)\.weight$", key):
            tensors[key] = torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1).to(value.dtype)
        elif head and re.search(r"\.(enorm|pre_fc_norm_embedding)\.weight$", key):
            tensors[key] = torch.ones_like(value)
        elif norm is not None and re.search(r"\.shared_head\.norm\.weight$|^mtp\.norm\.weight$", key):
            tensors[key] = norm.clone()
        elif key == "lm_head.weight":
            tensors[key] = value * WIDENED
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
