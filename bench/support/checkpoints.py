"""Checkpoints for measuring: one of Qwen3-30B-A3B's expert shape with random weights, and the widened demo."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.measurement import work_folder
from bench.support.zoo import make
from edgemoe.demo import demo_folder

WIDE_FAMILY = "qwen3_moe"
WIDE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

NARROW: dict[str, Any] = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
}
"""What makes the wide checkpoint one of a few megabytes."""
HYBRID_FAMILY = "qwen3_next"
HYBRID: dict[str, Any] = {
    **WIDE,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_hidden_layers": 8,
    "layer_types": 2 * [*3 * ["linear_attention"], "full_attention"],
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 64,
}
HYBRID_NARROW: dict[str, Any] = {
    **NARROW,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 4,
    "layer_types": [*3 * ["linear_attention"], "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
"""Qwen3-Next's shape with fewer layers and experts."""
FACTOR, SMALL_FACTOR = 128, 2
"""How many times as wide the experts of the inflated demo are as the shipped ones."""


def wide(*, small: bool = False, embedding_scale: float = 1.0) -> Path:
    """The 8 GB bf16 checkpoint: 6 layers of 128 experts of 2048 x 768, top-8. Made once, a shard a layer.

    The small one has 2 layers of 16 experts of 128 x 64. With usual embeddings the first layer's attention outweighs
    the token, so that most tokens choose the same experts. At an `embedding_scale` of the square root of the hidden
    size the token outweighs it, and the choice is nearly uniform.
    """
    folder = work_folder() / (
        ("narrow" if small else "wide") + (f"-{embedding_scale:g}" if embedding_scale != 1 else "")
    )
    return _made(folder, WIDE_FAMILY, WIDE | (NARROW if small else {}), embedding_scale)


def hybrid(*, small: bool = False) -> Path:
    """The 4 GB bf16 checkpoint of a hybrid family: 8 layers of 64 experts of 2048 x 512, top-8, 3 of 4 with states.

    The small one has 4 layers of 16 experts of 128 x 64.
    """
    folder = work_folder() / ("hybrid-narrow" if small else "hybrid")
    return _made(folder, HYBRID_FAMILY, HYBRID | (HYBRID_NARROW if small else {}), 1.0)


def _made(folder: Path, family: str, settings: dict[str, Any], embedding_scale: float) -> Path:
    """The checkpoint with random weights in `folder`, which is made once, a shard a layer."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(family, **settings)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).to(torch.bfloat16)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        for key, piece in _pieces(name, shape):
            tensor = _random(key, piece, noise, generator)
            shards.setdefault(layer, {})[key] = tensor * embedding_scale if "embed_tokens" in key else tensor
    weight_map = {}
    for layer, tensors in shards.items():
        file = f"model-{layer}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tiny() -> Path:
    """A random mixtral of two layers that has room for short texts only."""
    folder = work_folder() / "tiny"
    return folder if folder.exists() else make("mixtral", folder, num_hidden_layers=2, max_position_embeddings=128)


def _pieces(name: str, shape: torch.Size) -> Iterator[tuple[str, torch.Size]]:
    """The tensors that published Qwen3-MoE checkpoints have for a parameter: experts one by one."""
    prefix, _, stacked = name.rpartition(".experts.")
    if not prefix:
        yield name, shape
        return
    experts, rows, columns = shape
    for expert in range(experts):
        if stacked == "gate_up_proj":
            for part in ("gate_proj", "up_proj"):
                yield f"{prefix}.experts.{expert}.{part}.weight", torch.Size((rows // 2, columns))
        else:
            yield f"{prefix}.experts.{expert}.down_proj.weight", torch.Size((rows, columns))


def _random(key: str, shape: torch.Size, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random weights of the usual spread.

    Experts are cut from one block of noise, since drawing 4 billion numbers takes minutes; all else, the
    routers and embeddings above all, is drawn, so that routing is as spread as random weights make it.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    if ".experts." not in key:
        return torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5).to(torch.bfloat16)
    count = shape.numel()
    start = int(torch.randint(len(noise) - count, (1,), generator=generator))
    return noise[start : start + count].view(shape).mul(shape[-1] ** -0.5)


def inflated(factor: int = FACTOR, *, head: bool = True) -> Path:
    """The shipped model with every expert's inner neurons repeated `factor` times, a power of two.

    The down projection is divided by the factor, so that the function, the routing and the tokens stay
    the same while experts become as heavy as a real model's: 14 MB each at 128. Without `head` its draft head is left
    out.
    """
    if factor & (factor - 1):
        raise ValueError(f"the factor must be a power of two for the result to be exact, not {factor}")
    source = demo_folder()
    weights_file = source / "model.safetensors"
    # Of other weights, other folders.
    version = f"{zlib.crc32(weights_file.read_bytes()):08x}"
    folder = work_folder() / f"inflated-{factor}-{version}{'' if head else '-headless'}"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(weights_file, framework="pt") as weights:
        names = [name for name in weights.keys() if head or not name.startswith("mtp.")]  # noqa: SIM118
        parts: dict[str, list[str]] = {}
        for name in names:
            parts.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(name)
        for part, mine in parts.items():
            tensors = {name: _widened(name, weights.get_tensor(name), factor) for name in mine}
            save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config["moe_intermediate_size"] *= factor
    if not head:
        del config["num_nextn_predict_layers"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _widened(name: str, tensor: torch.Tensor, factor: int) -> torch.Tensor:
    if ".experts." not in name:
        return tensor
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return tensor.repeat(factor, 1)
    return (tensor / factor).repeat(1, factor)
