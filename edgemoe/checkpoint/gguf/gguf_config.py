"""A transformers configuration from the metadata of a GGUF file, which has no config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgemoe.checkpoint.gguf.gguf_file import GgufFile

Config = dict[str, Any]
SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers of gating functions."""
GLM_LITE_VOCABULARY = 154880
DEEPSEEK_GROUPS = {(61, 256): (8, 4), (60, 160): (8, 3)}
"""Groups of experts and those chosen, by layers and experts, in files that do not say them: DeepSeek V3 and V2."""


def config_of(file: GgufFile) -> Config | None:
    """The configuration as a dictionary with `model_type`; None for an architecture without a rule.

    Raises KeyError, TypeError or ValueError where the metadata lacks something.
    """
    make = CONFIGS.get(file.architecture)
    return None if make is None else _common(file) | make(file)


def _common(file: GgufFile) -> Config:
    heads = int(_need(file, "attention.head_count"))
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found: Config = {
        "num_hidden_layers": int(_need(file, "block_count")) - int(file.get("nextn_predict_layers", 0)),
        "max_position_embeddings": int(_need(file, "context_length")),
        "hidden_size": int(_need(file, "embedding_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.get("attention.head_count_kv", heads)),
        "rms_norm_eps": _float(_need(file, "attention.layer_norm_rms_epsilon")),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None,
        "hidden_act": "silu",
        "rope_parameters": _rope(file),
        "num_experts_per_tok": int(_need(file, "expert_used_count")),
    }
    if file.get("attention.key_length") is not None:
        found["head_dim"] = int(file.get("attention.key_length"))
    return found


def _rope(file: GgufFile) -> Config:
    """The rotation and its scaling."""
    found: Config = {"rope_type": "default", "rope_theta": _float(file.get("rope.freq_base", 10000.0))}
    kind = str(file.get("rope.scaling.type", "none"))
    if kind == "none":
        return found
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"the rotation is scaled by {kind}, whose factors it does not say: give another one as model_config="
        )
    found |= {"rope_type": kind, "factor": _float(_need(file, "rope.scaling.factor"))}
    if kind == "yarn":
        original = file.get("rope.scaling.original_context_length")
        if original is not None:
            found["original_max_position_embeddings"] = int(original)
        for key, name in {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}.items():
            if file.get(f"rope.scaling.{key}") is not None:
                found[name] = _float(file.get(f"rope.scaling.{key}"))
    return found


def _qwen3moe(file: GgufFile) -> Config:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": int(file.get("feed_forward_length", 0)),
        "moe_intermediate_size": _expert_width(file),
        "num_experts": _experts(file),
        # llama.cpp always does it.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": _has(file, "attn_q.bias"),
    }


def _qwen2moe(file: GgufFile) -> Config:
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": int(file.get("feed_forward_length", 0)),
        "moe_intermediate_size": _expert_width(file),
        "shared_expert_intermediate_size": _rows(file, "ffn_gate_shexp.weight"),
        "num_experts": _experts(file),
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": _has(file, "attn_q.bias"),
    }


def _olmoe(file: GgufFile) -> Config:
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "intermediate_size": _expert_width(file),
        "num_experts": _experts(file),
        "norm_topk_prob": False,
        "clip_qkv": None,
        "attention_bias": False,
    }


def _gpt_oss(file: GgufFile) -> Config:
    rope = _rope(file)
    if rope["rope_type"] == "yarn":
        rope = {"beta_fast": 32.0, "beta_slow": 1.0} | rope | {"truncate": False}
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": _expert_width(file),
        "num_local_experts": _experts(file),
        "sliding_window": int(_need(file, "attention.sliding_window")),
        "rope_parameters": rope,
        "attention_bias": True,
    }


def _granitemoe(file: GgufFile) -> Config:
    shared = _rows(file, "ffn_gate_shexp.weight") if _has(file, "ffn_gate_shexp.weight") else 0
    heads = int(_need(file, "attention.head_count"))
    width = int(_need(file, "embedding_length")) // heads
    found: Config = {
        "model_type": "granitemoeshared" if shared else "granitemoe",
        "architectures": ["GraniteMoeSharedForCausalLM" if shared else "GraniteMoeForCausalLM"],
        "intermediate_size": _expert_width(file),
        "num_local_experts": _experts(file),
        "attention_multiplier": _float(file.get("attention.scale") or width**-0.5),
        "embedding_multiplier": _float(file.get("embedding_scale") or 1.0),
        "residual_multiplier": _float(file.get("residual_scale") or 1.0),
        "logits_scaling": _float(file.get("logit_scale") or 1.0),
        "attention_bias": _has(file, "attn_q.bias"),
    }
    return found | ({"shared_intermediate_size": shared} if shared else {})


def _mixtral(file: GgufFile) -> Config:
    if not file.get("expert_count"):
        raise ValueError("it has no experts")
    if "rope_freqs.weight" in file.tensors:
        raise ValueError("the rotation is scaled by a table of frequencies: give another one as model_config=")
    head = file.get("rope.dimension_count")
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": int(_need(file, "feed_forward_length")),
        "num_local_experts": _experts(file),
        "sliding_window": None,
    } | ({"head_dim": int(head)} if head is not None else {})


def _glm4moe(file: GgufFile) -> Config:
    width, heads = int(_need(file, "embedding_length")), int(_need(file, "attention.head_count"))
    head = int(file.get("attention.key_length", width // heads))
    rope = _rope(file) | {"partial_rotary_factor": int(file.get("rope.dimension_count", head // 2)) / head}
    return {
        "model_type": "glm4_moe",
        "head_dim": head,
        "architectures": ["Glm4MoeForCausalLM"],
        "rope_parameters": rope,
        "attention_bias": _has(file, "attn_q.bias"),
        "use_qk_norm": _has(file, "attn_q_norm.weight"),
        "num_nextn_predict_layers": 0,
    } | _shared_and_grouped(file)


def _shared_and_grouped(file: GgufFile) -> Config:
    """What GLM and DeepSeek have in common."""
    return {
        "intermediate_size": int(file.get("feed_forward_length", 0)),
        "moe_intermediate_size": _expert_width(file),
        "n_routed_experts": _experts(file),
        "n_shared_experts": int(file.get("expert_shared_count", 0)),
        "first_k_dense_replace": _dense_layers(file),
        "routed_scaling_factor": _float(file.get("expert_weights_scale", 1.0)),
        "norm_topk_prob": bool(file.get("expert_weights_norm", False)),
        "n_group": int(file.get("expert_group_count", 1)),
        "topk_group": int(file.get("expert_group_used_count", 1)),
    }


def _deepseek2(file: GgufFile) -> Config:
    rotated, layers = int(_need(file, "rope.dimension_count")), int(_need(file, "block_count"))
    newer = file.get("attention.key_length_mla")
    key = int(newer if newer is not None else _need(file, "attention.key_length"))
    value = file.get("attention.value_length_mla") if newer is not None else file.get("attention.value_length")
    lite = file.tensors["token_embd.weight"].shape[0] == GLM_LITE_VOCABULARY
    sigmoid = lite or _has(file, "exp_probs_b.bias") or _has(file, "exp_probs_b")
    gating = int(file.get("expert_gating_func", SIGMOID if sigmoid else SOFTMAX))
    found = _shared_and_grouped(file)
    if file.get("expert_group_count") is None:
        found["n_group"], found["topk_group"] = DEEPSEEK_GROUPS.get((layers, _experts(file)), (1, 1))
    rope = _rope(file)
    multiplier = file.get("rope.scaling.yarn_log_multiplier")
    if multiplier:
        # The converter keeps a tenth of one of the two, which are the same in published models.
        rope["mscale"] = rope["mscale_all_dim"] = round(_float(multiplier) * 10, 6)
    family = "deepseek_v3" if gating == SIGMOID else "deepseek_v2"
    return found | {
        "model_type": family,
        "architectures": ["DeepseekV3ForCausalLM" if gating == SIGMOID else "DeepseekV2ForCausalLM"],
        "num_key_value_heads": int(_need(file, "attention.head_count")),
        "q_lora_rank": file.get("attention.q_lora_rank"),
        "kv_lora_rank": int(_need(file, "attention.kv_lora_rank")),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": int(value or 0),
        "head_dim": rotated,
        "topk_method": "group_limited_greedy" if found["n_group"] > 1 else "greedy",
        "rope_interleave": True,
        "rope_parameters": rope,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
    }


def _delta_net(file: GgufFile) -> Config:
    """What Qwen3-Next and Qwen3.5 have in common."""
    heads, head = int(_need(file, "ssm.time_step_rank")), int(_need(file, "attention.key_length"))
    every = int(file.get("full_attention_interval", 4))
    layers = int(_need(file, "block_count")) - int(file.get("nextn_predict_layers", 0))
    kinds = ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(layers)]
    return {
        "linear_conv_kernel_dim": int(_need(file, "ssm.conv_kernel")),
        "linear_key_head_dim": int(_need(file, "ssm.state_size")),
        "linear_num_key_heads": int(_need(file, "ssm.group_count")),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": int(_need(file, "ssm.inner_size")) // heads,
        "layer_types": kinds,
        "moe_intermediate_size": _expert_width(file),
        "shared_expert_intermediate_size": _rows(file, "ffn_gate_shexp.weight"),
        "num_experts": _experts(file),
        "attention_bias": False,
        "rope_parameters": _rope(file) | {"partial_rotary_factor": int(_need(file, "rope.dimension_count")) / head},
    }


def _qwen3next(file: GgufFile) -> Config:
    return _delta_net(file) | {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "intermediate_size": int(file.get("feed_forward_length", 0)),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen35moe(file: GgufFile) -> Config:
    found = _delta_net(file)
    sections = [each for each in file.get("rope.dimension_sections", []) if each]
    found["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True} if sections else {}
    return found | {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}


def _minimax(file: GgufFile) -> Config:
    head = int(_need(file, "attention.key_length"))
    rotated = int(file.get("rope.dimension_count", head))
    return {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "intermediate_size": _expert_width(file),
        "num_local_experts": _experts(file),
        "rotary_dim": rotated,
        "rope_parameters": _rope(file) | {"partial_rotary_factor": rotated / head},
    }


CONFIGS: dict[str, Callable[[GgufFile], Config]] = {
    "qwen3moe": _qwen3moe,
    "qwen2moe": _qwen2moe,
    "olmoe": _olmoe,
    "gpt-oss": _gpt_oss,
    "granitemoe": _granitemoe,
    "llama": _mixtral,
    "glm4moe": _glm4moe,
    "deepseek2": _deepseek2,
    "qwen3next": _qwen3next,
    "qwen35moe": _qwen35moe,
    "minimax-m2": _minimax,
}
"""By llama.cpp's name of the family."""


def _need(file: GgufFile, key: str) -> Any:
    value = file.get(key)
    if value is None:
        raise ValueError(f"{file.architecture}.{key} is missing")
    return value


def _float(value: Any) -> float:
    """A float32 of the file as the number that was written: 1e-06, not 9.99999997475e-07."""
    return float(str(np.float32(value)))


def _experts(file: GgufFile) -> int:
    return int(_need(file, "expert_count"))


def _expert_width(file: GgufFile) -> int:
    """The inner width of an expert, by its tensors: files name it differently."""
    for name, tensor in file.tensors.items():
        if name.endswith(".ffn_down_exps.weight"):
            return tensor.shape[2]
    return int(_need(file, "expert_feed_forward_length"))


def _dense_layers(file: GgufFile) -> int:
    """The number of layers before the first one with experts."""
    layer = 0
    while f"blk.{layer}.ffn_gate_inp.weight" not in file.tensors and f"blk.{layer}.attn_norm.weight" in file.tensors:
        layer += 1
    return layer


def _rows(file: GgufFile, end: str) -> int:
    return next(tensor.shape[0] for name, tensor in file.tensors.items() if name.endswith(f".{end}"))


def _has(file: GgufFile, end: str) -> bool:
    return any(name.endswith(f".{end}") for name in file.tensors)
