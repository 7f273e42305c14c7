"""What llama.cpp's converter does to a checkpoint of each family, and how to undo it: names, values, orders.

The converter is `convert_hf_to_gguf.py` of llama.cpp. A family that is not here is refused, since an order of rows that
nobody undoes gives wrong text without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from edgemoe.checkpoint.gguf.gguf_file import GgufFile

Change = Callable[[GgufFile], Callable[[torch.Tensor], torch.Tensor]]
"""Of a file: what turns a tensor of it into transformers'."""
Merge = Callable[[GgufFile], Callable[[Sequence[torch.Tensor]], torch.Tensor]]

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IGNORED = ("rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd")
"""Tensors that the configuration says as well."""
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip
SHARED = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
SHARED_PLURAL = {
    name: place.replace("shared_expert.", "shared_experts.") for name, place in SHARED.items() if "inp" not in name
}
MLA = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}  # fmt: skip
DELTA = {
    "ssm_conv1d": "linear_attn.conv1d", "ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj",
}  # fmt: skip
NEXTN = {
    "eh_proj": "eh_proj", "enorm": "enorm", "hnorm": "hnorm", "embed_tokens": "embed_tokens",
    "shared_head_norm": "shared_head.norm", "shared_head_head": "shared_head.head",
}  # fmt: skip
"""The parts of a draft head beside its layer, after `nextn.`."""
WHOLE = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias", "exp_probs_b": "mlp.gate.e_score_correction_bias"}
"""Names whose ends differ, too."""
DELTA_WHOLE = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}


@dataclass(frozen=True)
class Names:
    """One architecture's tensors in transformers. Names are those after `blk.N.`, without what comes after a dot."""

    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    whole: Mapping[str, str] = field(default_factory=dict)
    """Of names with their ends."""
    experts: str = "mlp.experts"
    """The experts module in a layer."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """By the name of the tensor."""
    merges: Mapping[tuple[str, ...], tuple[str, Merge]] = field(default_factory=dict)
    """Of several tensors, where all are there: the name in transformers' layer, and how it is made."""
    transposed: bool = False
    """Whether transformers has experts as [inputs, outputs]."""
    interleaved: bool = False
    """Whether transformers has the rows of gate and up in turns."""


# --- values and orders ---------------------------------------------------------------------------------


def _unpermuted(heads: str) -> Change:
    """Undoes the order of rows that llama.cpp's rotation of neighbours takes."""

    def of(file: GgufFile) -> Callable[[torch.Tensor], torch.Tensor]:
        count = int(file.get(heads) or file.get("attention.head_count"))

        def change(tensor: torch.Tensor) -> torch.Tensor:
            flat = tensor.reshape(count, tensor.shape[0] // count // 2, 2, *tensor.shape[1:])
            return flat.transpose(1, 2).reshape(tensor.shape)

        return change

    return of


def _minus_one(file: GgufFile) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor - 1


def _log_of_negative(file: GgufFile) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.log(-tensor)


def _row(file: GgufFile) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.reshape(1, -1)


def _convolution(file: GgufFile) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.reshape(tensor.shape[0], 1, -1)


def _chained(*changes: Change) -> Change:
    def of(file: GgufFile) -> Callable[[torch.Tensor], torch.Tensor]:
        made = [change(file) for change in changes]

        def run(tensor: torch.Tensor) -> torch.Tensor:
            for change in made:
                tensor = change(tensor)
            return tensor

        return run

    return of


def _key_and_value_up(file: GgufFile) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """kv_b_proj of its keys, [heads, rank, width], and values, [heads, width, rank]."""

    def merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        keys, values = parts
        joined = torch.cat([keys.transpose(1, 2), values], dim=1)
        return joined.reshape(-1, joined.shape[-1])

    return merge


def _below(file: GgufFile) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """One matrix below the other."""
    return lambda parts: torch.cat(list(parts))


def _delta(file: GgufFile) -> tuple[int, int, int, int]:
    """Key heads, value heads, and the widths of both, of a gated delta net."""
    keys, values = int(file.get("ssm.group_count")), int(file.get("ssm.time_step_rank"))
    return keys, values, int(file.get("ssm.state_size")), int(file.get("ssm.inner_size")) // values


def _by_key_head(file: GgufFile) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """in_proj_qkvz, in which each key head has its query, key, values and gates together."""
    keys, values, key_width, value_width = _delta(file)

    def merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        mixed, gates = parts
        hidden = mixed.shape[1]
        split = mixed.split([keys * key_width, keys * key_width, values * value_width])
        joined = torch.cat([each.reshape(keys, -1, hidden) for each in (*split, gates)], dim=1)
        return joined.reshape(-1, hidden)

    return merge


def _grouped_values(width: bool, *, after_keys: bool = False, columns: bool = False) -> Change:
    """Undoes the order of value heads: all first ones of the key heads, then all second ones."""

    def of(file: GgufFile) -> Callable[[torch.Tensor], torch.Tensor]:
        keys, values, key_width, value_width = _delta(file)
        own = value_width if width else 1
        start = 2 * keys * key_width if after_keys else 0

        def change(tensor: torch.Tensor) -> torch.Tensor:
            turned = tensor.transpose(0, 1) if columns else tensor
            head, tail = turned[:start], turned[start:]
            tail = tail.reshape(values // keys, keys, own, *tail.shape[1:]).transpose(0, 1).reshape(tail.shape)
            found = torch.cat([head, tail]) if start else tail
            return found.transpose(0, 1) if columns else found

        return change

    return of


PERMUTED = {"attn_q": _unpermuted("attention.head_count"), "attn_k": _unpermuted("attention.head_count_kv")}
OFFSET_NORMS = dict.fromkeys(
    ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "output_norm"), _minus_one
)
ARCHITECTURES: dict[str, Names] = {
    "qwen3moe": Names(),
    "qwen2moe": Names(LAYER | SHARED, changes={"ffn_gate_inp_shexp": _row}),
    "olmoe": Names(),
    "gpt-oss": Names(
        LAYER | {"ffn_gate_inp": "mlp.router"},
        {"attn_sinks.weight": "self_attn.sinks"},
        transposed=True,
        interleaved=True,
    ),
    "granitemoe": Names(
        LAYER | {"ffn_gate_inp": "block_sparse_moe.router.layer", "ffn_down_shexp": "shared_mlp.output_linear"},
        experts="block_sparse_moe.experts",
        changes=PERMUTED,
        merges={("ffn_gate_shexp", "ffn_up_shexp"): ("shared_mlp.input_linear.weight", _below)},
    ),
    "llama": Names(LAYER | {"ffn_gate_inp": "block_sparse_moe.gate"}, changes=PERMUTED),
    "glm4moe": Names(LAYER | SHARED_PLURAL, WHOLE),
    "deepseek2": Names(
        LAYER | SHARED_PLURAL | MLA,
        WHOLE,
        merges={("attn_k_b", "attn_v_b"): ("self_attn.kv_b_proj.weight", _key_and_value_up)},
    ),
    "qwen3next": Names(
        LAYER | SHARED | DELTA | {"ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"},
        DELTA_WHOLE,
        changes=OFFSET_NORMS | {"ffn_gate_inp_shexp": _row, "ssm_a": _log_of_negative, "ssm_conv1d": _convolution},
        merges={("attn_qkv", "attn_gate"): ("linear_attn.in_proj_qkvz.weight", _by_key_head)},
    ),
    "qwen35moe": Names(
        LAYER
        | SHARED
        | DELTA
        | {
            "attn_qkv": "linear_attn.in_proj_qkv",
            "attn_gate": "linear_attn.in_proj_z",
            "ssm_alpha": "linear_attn.in_proj_a",
            "ssm_beta": "linear_attn.in_proj_b",
        },
        DELTA_WHOLE,
        changes=OFFSET_NORMS
        | {
            "ffn_gate_inp_shexp": _row,
            "attn_qkv": _grouped_values(True, after_keys=True),
            "attn_gate": _grouped_values(True),
            "ssm_conv1d": _chained(_grouped_values(True, after_keys=True), _convolution),
            "ssm_alpha": _grouped_values(False),
            "ssm_beta": _grouped_values(False),
            "ssm_a": _chained(_log_of_negative, _grouped_values(False)),
            "ssm_dt": _grouped_values(False),
            "ssm_out": _grouped_values(True, columns=True),
        },
    ),
    "minimax-m2": Names(
        LAYER | {"ffn_gate_inp": "block_sparse_moe.gate"},
        dict.fromkeys(WHOLE, "block_sparse_moe.e_score_correction_bias"),
    ),
}
"""By llama.cpp's name."""
