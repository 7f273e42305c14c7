"""Writes tiny checkpoints as GGUF files, with the names, orders and values that llama.cpp's converter gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file

from bench.support.zoo import make
from edgemoe.formats.gguf_format import BLOCKS

LEAVES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "linear_attn.in_proj_ba": "ssm_ba", "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
}  # fmt: skip
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
EXPERTS |= {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
ARCHITECTURES = {
    "qwen3_moe": "qwen3moe", "mixtral": "llama", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss",
    "qwen3_next": "qwen3next", "glm4_moe": "glm4moe",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
}
SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ3_S": (0,), "IQ3_XXS": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
}  # fmt: skip
"""Where in a block the scales of type float16 are, of types that the gguf package reads and does not write."""
Kind = GGMLQuantizationType


class GgufMaker:
    """A checkpoint, and its GGUF file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.arch = ARCHITECTURES[self.config["model_type"]]

    @classmethod
    def of_zoo(cls, family: str, folder: Path, **config: Any) -> GgufMaker:
        """The same for a checkpoint of the zoo, which is made in `folder`."""
        return cls(make(family, folder / "hf", **SETTINGS.get(family, {}) | config))

    def names(self) -> list[str]:
        """The names of the file's tensors."""
        return [name for name, _ in self.tensors()]

    def write(
        self,
        path: Path,
        experts: Kind | None = None,
        dense: Kind | None = None,
        own: Mapping[str, Kind | None] | None = None,
    ) -> Path:
        """The file, with experts and large dense matrices in a packed type; `own` are those of single tensors."""
        self._write(path, list(self.tensors()), experts, dense, own=own)
        return path

    def write_split(self, path: Path, experts: Kind | None = None, dense: Kind | None = None, parts: int = 2) -> Path:
        """The same as files of `parts`, whose names begin with `path`: the first one."""
        tensors = list(self.tensors())
        paths = [path.with_name(f"{path.name}-{part + 1:05}-of-{parts:05}.gguf") for part in range(parts)]
        for part, each in enumerate(paths):
            self._write(each, tensors[part::parts], experts, dense, part, parts)
        return paths[0]

    def _write(
        self,
        path: Path,
        tensors: list[tuple[str, torch.Tensor]],
        experts: Kind | None,
        dense: Kind | None,
        part: int = 0,
        parts: int = 1,
        own: Mapping[str, Kind | None] | None = None,
    ) -> None:
        writer = GGUFWriter(str(path), self.arch)
        if part == 0:
            self.describe(writer)
        if parts > 1:
            writer.add_uint16("split.count", parts)
        for name, value in tensors:
            kind = (own or {}).get(name, experts if "_exps.weight" in name else dense)
            array = np.ascontiguousarray(value.float().numpy())
            if kind is None or array.ndim < 2 or "norm" in name or "ffn_gate_inp" in name:
                writer.add_tensor(name, array)
            else:
                writer.add_tensor(name, _packed(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def describe(self, writer: GGUFWriter) -> None:
        """The metadata."""
        config = self.config
        rope = config.get("rope_parameters") or {}
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
        writer.add_expert_count(
            config.get("num_experts") or config.get("num_local_experts") or config["n_routed_experts"]
        )
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_eos_token_id(2)
        if config.get("head_dim") and self.arch not in ("llama", "deepseek2"):
            writer.add_key_length(config["head_dim"])
        if self.arch == "llama":
            writer.add_rope_dimension_count(config["head_dim"])
        if self.arch == "gpt-oss":
            writer.add_sliding_window(config["sliding_window"])
        if self.arch == "gpt-oss" and "factor" in rope:
            writer.add_rope_scaling_type(_yarn())
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if self.arch in ("deepseek2", "glm4moe"):
            writer.add_expert_shared_count(config["n_shared_experts"])
            writer.add_expert_weights_scale(config["routed_scaling_factor"])
            writer.add_expert_weights_norm(config["norm_topk_prob"])
            writer.add_expert_group_count(config["n_group"])
            writer.add_expert_group_used_count(config["topk_group"])
        if self.arch == "glm4moe":
            head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            writer.add_rope_dimension_count(int(head * rope["partial_rotary_factor"]))
        if self.arch == "deepseek2":
            writer.add_q_lora_rank(config["q_lora_rank"])
            writer.add_kv_lora_rank(config["kv_lora_rank"])
            writer.add_rope_dimension_count(config["qk_rope_head_dim"])
            writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
            writer.add_value_length_mla(config["v_head_dim"])
        if self.arch == "qwen3next":
            writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
            writer.add_ssm_state_size(config["linear_key_head_dim"])
            writer.add_ssm_group_count(config["linear_num_key_heads"])
            writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
            writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
            writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors by llama.cpp's names."""
        stacks: dict[str, list[torch.Tensor]] = {}
        files = sorted(self.folder.glob("*.safetensors"))
        for name, value in (item for file in files for item in load_file(file).items()):
            if name.startswith("mtp."):
                continue
            match = re.match(r"^model\.layers\.(\d+)\.(.+)$", name)
            if match is None:
                top = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
                yield top.get(name, "output_norm.weight"), self._offset(name, value)
                continue
            layer, rest = f"blk.{match[1]}", match[2]
            expert = re.match(r"^(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$", rest)
            if expert is not None:
                stacks.setdefault(f"{layer}.{EXPERTS[expert[2]]}.weight", [])
                stack = stacks[f"{layer}.{EXPERTS[expert[2]]}.weight"]
                stack.extend([value] * (int(expert[1]) + 1 - len(stack)))
                stack[int(expert[1])] = value
                continue
            for own, tensor in self._of_layer(rest, value):
                yield f"{layer}.{own}", tensor
        for name, stack in stacks.items():
            yield name, torch.stack(stack)

    def _of_layer(self, rest: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        config = self.config
        base, _, end = rest.rpartition(".")
        if rest == "post_attention_layernorm.weight":
            name = "ffn_norm" if self.arch in ("qwen3moe", "llama", "deepseek2") else "post_attention_norm"
            yield f"{name}.weight", self._offset(rest, value)
        elif self.arch == "llama" and base in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if "q_proj" in base else "num_key_value_heads"]
            permuted = value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
            yield f"{LEAVES[base]}.{end}", permuted
        elif base == "self_attn.kv_b_proj":
            nope, width = config["qk_nope_head_dim"], config["v_head_dim"]
            heads = value.view(config["num_attention_heads"], nope + width, -1)
            yield "attn_k_b.weight", heads[:, :nope].transpose(1, 2)
            yield "attn_v_b.weight", heads[:, nope:]
        elif rest.endswith("e_score_correction_bias"):
            yield "exp_probs_b.bias", value
        elif rest == "self_attn.sinks":
            yield "attn_sinks.weight", value
        elif rest.startswith("mlp.experts."):
            yield from self._fused(rest.removeprefix("mlp.experts."), value)
        elif base == "linear_attn.in_proj_qkvz":
            yield from self._mixed(value)
        elif rest == "linear_attn.A_log":
            yield "ssm_a", -value.float().exp()
        elif rest == "linear_attn.dt_bias":
            yield "ssm_dt.bias", value
        elif rest == "linear_attn.conv1d.weight":
            yield "ssm_conv1d.weight", value.squeeze(1)
        elif base == "mlp.shared_expert_gate":
            yield "ffn_gate_inp_shexp.weight", value.flatten()
        else:
            yield f"{LEAVES[base]}.{end}", self._offset(rest, value)

    def _fused(self, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """gpt-oss: transposed, with gate and up in turns."""
        if name == "gate_up_proj":
            turned = value.transpose(1, 2)
            yield "ffn_gate_exps.weight", turned[:, ::2]
            yield "ffn_up_exps.weight", turned[:, 1::2]
        elif name == "gate_up_proj_bias":
            yield "ffn_gate_exps.bias", value[:, ::2]
            yield "ffn_up_exps.bias", value[:, 1::2]
        elif name == "down_proj":
            yield "ffn_down_exps.weight", value.transpose(1, 2)
        else:
            yield "ffn_down_exps.bias", value

    def _mixed(self, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A gated delta net's projections, apart and with all key heads of one together."""
        config, hidden = self.config, value.shape[1]
        keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        key, each = config["linear_key_head_dim"], config["linear_value_head_dim"] * values // keys
        parts = value.view(keys, -1, hidden).split([key, key, each, each], dim=1)
        yield "attn_qkv.weight", torch.cat([part.reshape(-1, hidden) for part in parts[:3]])
        yield "attn_gate.weight", parts[3].reshape(-1, hidden)

    def _offset(self, name: str, value: torch.Tensor) -> torch.Tensor:
        offset = self.arch == "qwen3next" and "norm" in name and "linear_attn" not in name
        return value + 1 if offset else value


def _packed(values: np.ndarray, kind: Kind) -> np.ndarray:
    """`values` in `kind`, or as many random ones of a like size where the gguf package does not quantise to it."""
    if kind.name not in SCALES:
        return quants.quantize(values, kind)
    count, nbytes = BLOCKS[kind.name]
    blocks = np.random.default_rng(values.size).integers(0, 256, (values.size // count, nbytes), np.uint8)
    for scale in (1.0, None):
        # Of values with a scale of 1 the size is known, and so the scale for the wanted one.
        spread = 1.0 if scale else float(quants.dequantize(blocks, kind).std())
        for at in SCALES[kind.name]:
            blocks[:, at : at + 2] = np.array([scale or values.std() / spread], np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def _yarn() -> Any:
    from gguf import RopeScalingType

    return RopeScalingType.YARN
