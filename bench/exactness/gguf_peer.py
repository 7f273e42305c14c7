"""`gguf-peer`: GGUF files made by llama.cpp, run by edgemoe and by llama.cpp.

llama.cpp multiplies packed weights with activations that it rounds to 8 bits, so its logits are not quite those of the
file's values. Its own logits of the same values in float32 say how far: edgemoe, which computes in float32, must agree
with those much more closely. The layers of the tiny checkpoints add little to the token's own vector, as in trained
models; otherwise that rounding would make llama.cpp choose other experts than itself.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.measurement import BaseSize, Measurement
from bench.support import zoo
from bench.support.byte_tokenizer import with_tokenizer
from bench.support.llama_cpp_peer.llama_cpp import INSTALL, LlamaCpp, PeerError, llama_cpp
from edgemoe import Engine
from edgemoe.errors import EdgeMoEError
from edgemoe.measure.eval_texts import EvalText
from edgemoe.measure.quality import divergences
from edgemoe.measure.teacher_forcing import TeacherForcedScorer
from edgemoe.quiet import quiet_transformers

NAME = "gguf-peer"
MOST_NATS = 5e-3
"""From llama.cpp's logits."""
MOST_NATS_OF_VALUES = 1e-5
"""From its logits of the same values in float32, in which its KV cache of float16 is all that it rounds."""
BAR = (
    f"KL divergence <= {MOST_NATS:g} from llama.cpp, and <= {MOST_NATS_OF_VALUES:g} from llama.cpp on the same values "
    "in float32, at every position; top-1 equals llama.cpp's as often as that of the same values in float32 does"
)
ROUNDING = 1.01
"""edgemoe may be further from llama.cpp than the bar only where llama.cpp's float32 is as far, up to this factor."""
VOCABULARY = 512
WIDE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256, "shared_intermediate_size": 256, "head_dim": 64,
    "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
"""Rows of a multiple of 256 values, the block of most types, where a family has the field."""
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen2_moe": {"mlp_only_layers": [], "use_sliding_window": False},
    "olmoe": {"clip_qkv": None, "num_key_value_heads": 4},
    "mixtral": {},
    "granitemoe": {},
    "granitemoeshared": {},
    # llama.cpp chooses groups of experts as V3 does, by the sum of their best two, where V2 takes the best one.
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {},
    "glm4_moe": {},
    "glm4_moe_lite": {"mlp_layer_types": zoo.DENSE_FIRST},
    "gpt_oss": {"intermediate_size": 256},
    "minimax_m2": {"intermediate_size": 256},
    "qwen3_next": {"mlp_only_layers": []},
    "qwen3_5_moe_text": {},
}
"""What the configuration sets beyond the zoo's and WIDE: what llama.cpp can say of the family."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "glm4_moe_lite": {"scoring_func": "sigmoid", "first_k_dense_replace": 1},
    "minimax_m2": {"scoring_func": "sigmoid"},
}
"""What published configurations say and the converter reads, and transformers does not write."""
TYPES = (
    "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S",
)  # fmt: skip
OUTPUTS = ("o_proj.", "down_proj", "out_proj.", "output_linear", ".w2.")
"""What the names of the matrices contain whose products are added to a token's vector."""
OUTPUT_SCALE, TIED_OUTPUT_SCALE = 0.01, 0.0002
"""Of those; and where the embeddings, which are the head as well, are as small as the zoo makes them."""
HEAD_SCALE = 2.0
"""So that the likeliest token stands out."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Families, types and tokens of a text."""

    families: tuple[str, ...] = tuple(FAMILIES)
    types: tuple[str, ...] = TYPES
    tokens: int = 64


FULL, SMALL = Size(), Size(small=True, families=("qwen3_moe",), types=("Q4_K_M",), tokens=16)


def run(size: Size = FULL) -> Measurement:
    """Every family in every type."""
    peer = llama_cpp()
    if peer is None:
        return Measurement(NAME, None, BAR, False, {"why": INSTALL})
    table: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for family in size.families:
        with tempfile.TemporaryDirectory(prefix="edgemoe-peer-") as folder, quiet_transformers():
            rows = measured(Path(folder), family, peer, size)
        for kind, row in rows.items():
            table[f"{family}, {kind}"] = row
            if row["wrong"]:
                wrong.append(f"{family}, {kind}: {row['wrong']}")
            if not size.small:
                print(f"{family:18} {kind:8} {described(row)}", flush=True)
    return Measurement(NAME, {"cases": len(table), "wrong": wrong}, BAR, not wrong, table)


def measured(folder: Path, family: str, peer: LlamaCpp, size: Size) -> dict[str, dict[str, Any]]:
    """A row for every type of one family."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 259, (size.tokens,), generator=generator).tolist()
    try:
        original = peer.convert(checkpoint(family, folder / "hf"), folder / "original.gguf")
    except PeerError as error:
        return {kind: {"wrong": str(error)} for kind in size.types}
    rows = {}
    for kind in size.types:
        file = folder / f"{kind}.gguf"
        try:
            peer.quantize(original, file, kind)
            values = peer.quantize(file, folder / "values.gguf", "F32")
            rows[kind] = compared(peer.logits(file, tokens), peer.logits(values, tokens), engine_logits(file, tokens))
        except (PeerError, EdgeMoEError) as error:
            rows[kind] = {"wrong": str(error)}
        file.unlink(missing_ok=True)
    return rows


def checkpoint(family: str, folder: Path) -> Path:
    """A tiny checkpoint of `family`, with a tokenizer and a configuration that llama.cpp's converter reads."""
    plain = zoo.config(family)
    latent = hasattr(plain, "kv_lora_rank")
    wide = {name: value for name, value in WIDE.items() if hasattr(plain, name) and not (latent and name == "head_dim")}
    zoo.make(family, folder, **wide | FAMILIES[family])
    with_tokenizer(folder, merge=("a", "b"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PUBLISHED.get(family, {})))
    tensors = load_file(folder / "model.safetensors")
    scale = OUTPUT_SCALE if "lm_head.weight" in tensors else TIED_OUTPUT_SCALE
    for name, tensor in tensors.items():
        if any(each in name for each in OUTPUTS):
            tensor *= scale
        elif name == "lm_head.weight":
            tensor *= HEAD_SCALE
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def engine_logits(file: Path, tokens: list[int]) -> torch.Tensor:
    """edgemoe's logits after each of `tokens` but the first, with slots for a third of the experts."""
    with Engine.load(file, device="cpu", dtype="float32", state_folder="none", expert_cache="30%") as engine:
        # A scorer leaves the last token out, which nothing follows.
        return torch.cat(list(TeacherForcedScorer(engine).predictions(EvalText([*tokens, 0], 1))))


def compared(theirs: torch.Tensor, of_values: torch.Tensor, ours: torch.Tensor) -> dict[str, Any]:
    """llama.cpp's logits, those of its file's values in float32, and edgemoe's, which lack the first position."""
    theirs, of_values = theirs[1:], of_values[1:]
    own, rounding, values = divergence(theirs, ours), divergence(theirs, of_values), divergence(of_values, ours)
    best, best_of_values = (each.argmax(-1) == theirs.argmax(-1) for each in (ours, of_values))
    over = (own > MOST_NATS) & (own > ROUNDING * rounding)
    faults = []
    if over.any():
        faults.append(f"{int(over.sum())} positions are {float(own[over].max()):.1e} nats from llama.cpp")
    if not float(values.max()) <= MOST_NATS_OF_VALUES:
        faults.append(f"{float(values.max()):.1e} nats from llama.cpp in float32")
    if int(best.sum()) < int(best_of_values.sum()):
        faults.append(f"top-1 agrees {int(best.sum())} times, not {int(best_of_values.sum())}")
    return {
        "kl": float(own.max()),
        "kl_of_values": float(values.max()),
        "peer_kl_of_values": float(rounding.max()),
        "over": int((own > MOST_NATS).sum()),
        "top1": int(best.sum()),
        "peer_top1_of_values": int(best_of_values.sum()),
        "positions": len(ours),
        "wrong": "; ".join(faults),
    }


def divergence(right: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The KL divergence of each row of `found` from `right`, in nats."""
    return divergences(right.double().log_softmax(-1), found.double().log_softmax(-1))


def described(row: dict[str, Any]) -> str:
    """One line about a row."""
    if "kl" not in row:
        return str(row["wrong"])
    return (
        f"KL {row['kl']:.1e} (llama.cpp from its float32 {row['peer_kl_of_values']:.1e}, edgemoe from that "
        f"{row['kl_of_values']:.1e}), top-1 {row['top1']} and {row['peer_top1_of_values']} of {row['positions']} "
        f"{row['wrong']}"
    )
