"""Tiny random-weight checkpoints of mixture-of-experts families, written by transformers itself.

`make("mixtral", folder)` builds one checkpoint of one to four megabytes: four or so layers, eight or twelve experts,
hidden size 64, vocabulary 256. The weights are random but wide enough that routing and greedy output vary.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

DEFAULTS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Set on every configuration that has the attribute; a family's own entry wins."""

MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
GROUPED: dict[str, Any] = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WINDOWED: dict[str, Any] = {"layer_types": SLIDING, "sliding_window": 6}
LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 8}
DELTA: dict[str, Any] = {
    "layer_types": LINEAR,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

CONSTANTS = {"A_log", "D", "dt_bias", "slope_rate", "query_decay", "key_decay", "diagonal_decay"}
"""Names of state-space and decay tensors, which must keep the values the family gives them."""

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, **WINDOWED, "mup_enabled": True, "route_scale": 1.5},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**MLA, **GROUPED},
    "axk2": {**MLA, **GROUPED, **INDEXER},
    "bailing_hybrid": {
        **MLA,
        **GROUPED,
        "num_local_experts": 12,
        "first_k_dense_replace": 1,
        "layer_types": LINEAR,
        "short_conv_kernel_size": 4,
    },
    "beam": {**GROUPED, **WINDOWED, "num_experts": 12, "mlp_layer_types": DENSE_FIRST},
    "cohere2_moe": {
        **WINDOWED,
        "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 96,
        "mlp_layer_types": DENSE_FIRST,
        "tie_word_embeddings": True,
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": {
        **MLA,
        **GROUPED,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {**MLA, **GROUPED, "first_k_dense_replace": 1},
    "deepseek_v32": {**MLA, **GROUPED, **INDEXER, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "moe_intermediate_size": 32,
        "num_key_value_heads": 1,
        "q_lora_rank": 32,
        "partial_rotary_factor": 0.5,
        "sliding_window": 8,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 8,
        "index_head_dim": 16,
        "index_topk": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "dots1": {**GROUPED, **WINDOWED, "first_k_dense_replace": 1, "norm_topk_prob": True},
    "dots3_note_text": {
        **MLA,
        **GROUPED,
        **INDEXER,
        "shared_experts_intermediate_size": 48,
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 6,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_moe": {
        "tie_word_embeddings": True,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**GROUPED, **WINDOWED, "num_experts": 12},
    "flex_olmo": {},
    "flint": {**WINDOWED, "mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        **WINDOWED,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 256,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {**GROUPED, "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": {**MLA, **GROUPED},
    "glm_moe_dsa": {**MLA, **GROUPED, **INDEXER, "first_k_dense_replace": 1},
    "gpt_oss": {
        "num_local_experts": 8,
        **WINDOWED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "granitemoe": {"embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.5},
    "granitemoe_swa": {"shared_intermediate_size": 48, "sliding_window": 6},
    "granitemoehybrid": {
        "shared_intermediate_size": 48,
        "layer_types": LINEAR,
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": {"shared_intermediate_size": 48, "tie_word_embeddings": True},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v3": {"mlp_layer_types": DENSE_FIRST},
    "hy_v4": {**MLA, **GROUPED, **INDEXER, "hc_mult": 2},
    "inkling2_text": {
        "unpadded_vocab_size": 250,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 6,
        "d_rel": 4,
        "rel_extent": 16,
        "n_layers_per_attn_res_block": 2,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
    },
    "inkling_text": {
        "unpadded_vocab_size": 250,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 6,
        "d_rel": 4,
        "rel_extent": 16,
        "n_shared_experts": 2,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": DENSE_FIRST,
    },
    "jamba": {
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_hidden_layers": 6,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
    "kimi_linear": {
        **MLA,
        **GROUPED,
        "q_lora_rank": None,
        "num_local_experts": 12,
        "layer_types": LINEAR,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "kolibri1": {**WINDOWED},
    "laguna": {**WINDOWED, "moe_routed_scaling_factor": 1.5},
    "lfm2_moe": {
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "tie_word_embeddings": True,
    },
    "llama4_text": {"intermediate_size_mlp": 96, "attention_chunk_size": 8, "num_experts_per_tok": 1},
    "longcat_flash": {
        **MLA,
        "head_dim": 8,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 3,
        "zero_expert_num": 4,
    },
    "mellum": {**WINDOWED},
    "mimo_v2_flash": {**GROUPED, **WINDOWED, "head_dim": 24, "v_head_dim": 16},
    "minimax": {
        "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
        "block_size": 8,
        "full_attn_alpha_factor": 1.1,
        "mlp_beta_factor": 0.9,
    },
    "minimax_m2": {"num_experts_per_tok": 2},
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "intermediate_size": 32,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "mlp_layer_types": DENSE_FIRST,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
    },
    "mixtral": {},
    "nemotron_h": {
        "num_hidden_layers": 7,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp", "linear_attention", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 48,
        **GROUPED,
    },
    "olmoe": {"num_experts": 12, "num_experts_per_tok": 3, "norm_topk_prob": False, "clip_qkv": 4.0},
    "phimoe": {"router_jitter_noise": 0.01},
    "qwen2_moe": {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 4},
    "qwen3_5_moe_text": DELTA,
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 3, "mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen3_next": DELTA,
    "qwen4_exp_text": {
        **DELTA,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"],
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "solar_open": GROUPED,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 64},
}
"""Family (transformers' `model_type`) to what its tiny configuration sets beyond DEFAULTS."""

REFUSED = frozenset({"dbrx", "doge", "jetmoe", "llama4_text", "longcat_flash"})
"""Families of the zoo whose experts do not go through transformers' experts interface."""

TOWER: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
GEMMA_TOWER: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": {**GEMMA_TOWER, "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 4}},
    "qwen3_5_moe": {"vision_config": {**TOWER, "patch_size": 4, "num_position_embeddings": 16}},
    "qwen4_exp": {"vision_config": {**TOWER, "patch_size": 4, "num_position_embeddings": 16}},
}
"""Families that hold the configuration of `<family>_text` next to a vision tower, as published checkpoints do."""
TESTED = tuple(name for name in (*FAMILIES, *WRAPPERS) if name not in REFUSED)
"""What edgemoe runs, and measurements of exactness go through."""


def config(family: str, **overrides: Any) -> Any:
    """The tiny transformers configuration of `family`; KeyError for one that the zoo or transformers does not hold."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family in WRAPPERS:
        text = config(f"{family}_text", **overrides).to_dict()
        tied = text["tie_word_embeddings"]
        return AutoConfig.for_model(family, text_config=text, tie_word_embeddings=tied, **WRAPPERS[family])
    cls: Any = CONFIG_MAPPING[family]
    known = {field.name for field in fields(cls)}
    chosen = {key: value for key, value in DEFAULTS.items() if key in known}
    return AutoConfig.for_model(family, **{**chosen, **FAMILIES[family], **overrides})


def make(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint of `family`, one of FAMILIES or WRAPPERS, into `folder` and return `folder`.

    `overrides` go into the (text) configuration; a small `max_shard_size` ("64KB") makes it a sharded checkpoint.
    The same arguments give the same bytes, and torch's global random state is left as it was.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config(family, **overrides), dtype=dtype)
    spread(model, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@torch.no_grad()
def spread(model: Any, seed: int) -> None:
    """Draw every weight wide enough that routing and output vary; norms and state-space constants keep their values."""
    generator = torch.Generator().manual_seed(seed)
    text = model.config.get_text_config()
    wide = 0.02 if getattr(text, "tie_word_embeddings", False) else 1.0
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "tid2eid":
            rows = torch.rand(tensor.shape[0], text.n_routed_experts, generator=generator)
            tensor.copy_(rows.argsort(-1)[:, : tensor.shape[1]])
        if not tensor.is_floating_point() or leaf in CONSTANTS or "norm" in name:
            continue
        if tensor.ndim >= 2:
            std = wide if "embed" in name or "wte" in name else 0.1
        elif "bias" in leaf:
            std = 0.05
        else:
            continue
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
