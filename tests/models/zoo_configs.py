"""Configs of a few thousand weights for every class of model that mlx-lm has."""

from __future__ import annotations

import pkgutil
from typing import Any

import mlx_lm.models as classes

VOCAB = 320

_WIDTH, _LAYERS, _HEADS, _HEAD = 64, 4, 2, 32

COMMON: dict[str, Any] = {
    # Under all the names that classes have for these; each takes those that it knows.
    "vocab_size": VOCAB,
    "padded_vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "hidden_size": _WIDTH,
    "n_embd": _WIDTH,
    "d_model": _WIDTH,
    "dim": _WIDTH,
    "model_dim": _WIDTH,
    "intermediate_size": _WIDTH,
    "ffn_hidden_size": _WIDTH,
    "mlp_hidden_size": 2 * _WIDTH,
    "n_inner": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_layers": _LAYERS,
    "n_layers": _LAYERS,
    "n_layer": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_heads": _HEADS,
    "n_heads": _HEADS,
    "n_head": _HEADS,
    "num_key_value_heads": 1,
    "n_kv_heads": 1,
    "num_kv_heads": 1,
    "multi_query_group_num": 1,
    "head_dim": _HEAD,
    "rotary_dim": _HEAD,
    "kv_channels": _HEAD,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "rope_scaling": None,
    "rope_traditional": False,
    "rope_local_base_freq": 10000.0,
    "max_position_embeddings": 4096,
    "n_positions": 4096,
    "n_ctx": 4096,
    "seq_length": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    # Mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    # Attention by latents
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    # Recurrent layers
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "state_size": 16,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": [0.0, 100.0],
    "time_step_rank": "auto",
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}

_SCALES = {"logits_scaling": 1.0, "attention_multiplier": 0.2, "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
_INDEX = {
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 64,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_CONV = {"conv_bias": False, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2}
_LONGCAT = {
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 1,
    "zero_expert_type": "identity",
    "attention_method": "MLA",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "q_lora_rank": 32,
    "num_key_value_heads": _HEADS,
}
_MINICPM = {"dim_model_base": 64, "scale_depth": 1.0, "scale_emb": 1.0}
_ROTATION = {"rope_type": "default", "rope_theta": 10000.0}
_SCALED = {**_ROTATION, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4096}
_BY_TYPE = {"sliding_attention": _ROTATION, "full_attention": _ROTATION}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 1.0, "mscale_all_dim": 1.0}
_LONG = {"type": "longrope", "original_max_position_embeddings": 4096, "short_factor": [1.0] * 16}
_GEMMA4 = {
    "num_kv_shared_layers": 2,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "tie_word_embeddings": True,
}
_LINEAR = {"layer_group_size": 2, "group_norm_size": 1}

OWN: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {
        "sliding_window_layers": [0],
        "conv_window": 2,
        "num_swa_attention_heads": _HEADS,
        "num_swa_key_value_heads": 1,
    },
    "bailing_hybrid": _LINEAR,
    "bailing_moe_linear": _LINEAR,
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "glm_moe_dsa": {**_INDEX, "q_lora_rank": 32, "rope_parameters": _ROTATION, "num_key_value_heads": _HEADS},
    "deepseek_v32": {**_INDEX, "q_lora_rank": 32, "num_key_value_heads": _HEADS},
    "deepseek_v2": {"rope_scaling": _YARN, "num_key_value_heads": _HEADS},
    "exaone4": {"sliding_window_pattern": "LG"},
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "mellum": {"rope_parameters": _BY_TYPE},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1, 1, 1]},
    "ministral3": {"rope_parameters": _SCALED},
    "mistral4": {"rope_parameters": _SCALED, "q_lora_rank": 32, "num_key_value_heads": _HEADS},
    "plamo": {"n_shared_head": 2},
    "mamba2": {"num_heads": 4},
    "granite": _SCALES,
    "granitemoe": _SCALES,
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        **_SCALES,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 32,
    },
    "hunyuan": {"use_mixed_mlp_moe": True, "use_cla": False, "cla_share_factor": 2}
    | {"rope_scaling": {"type": "dynamic", "alpha": 1.0, "factor": 1.0}},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "num_heads": _HEADS,
            "head_dim": _HEAD,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 4096,
    },
    "lfm2": {**_CONV, "block_dim": 64, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0}
    | {"block_auto_adjust_ff_dim": False, "block_ff_dim": 64},
    "lfm2_moe": {**_CONV, "use_expert_bias": True, "num_dense_layers": 1},
    "lfm2-vl": {**_CONV, "block_dim": 64, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0}
    | {"block_auto_adjust_ff_dim": False, "block_ff_dim": 64},
    "lille-130m": {"block_size": 4096},
    "llama4": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8}
    | {"interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": _HEADS,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": _HEAD,
        "swa_v_head_dim": _HEAD,
        "moe_layer_freq": [0, 1, 1, 1],
    },
    "minicpm": _MINICPM,
    "minicpm3": {
        **_MINICPM,
        "rope_scaling": {**_LONG, "long_factor": [1.0] * 16},
        "q_lora_rank": 32,
        "num_key_value_heads": _HEADS,
    },
    "minimax": {"shared_intermediate_size": 32},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
            }
        ]
        * _LAYERS
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "hybrid_override_pattern": "M*M-",
    },
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {
        "num_transformer_layers": _LAYERS,
        "ffn_dim_divisor": 32,
        "num_query_heads": [_HEADS] * _LAYERS,
        "num_kv_heads": [1] * _LAYERS,
        "ffn_multipliers": [1.0] * _LAYERS,
    },
    "phi3small": {"dense_attention_every_n_layers": 2, "ff_intermediate_size": 64, "gegelu_limit": 20.0},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 8,
        "lru_width": _WIDTH,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {"a_low_rank_dim": 16, "v_low_rank_dim": 16, "gate_low_rank_dim": 16, "decay_low_rank_dim": 16},
    "spark2_5": {"rope_parameters": _BY_TYPE},
    "stablelm": {"use_qkv_bias": False},
    "step3p5": {"num_attention_groups": 1},
}

_NO_TYPES = ("falcon_h1", "jamba", "mamba", "mamba2")
"""Classes for which transformers computes the types of layers from other fields."""

INNER = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4_text",
    "minimax_m3_vl": "minimax_m3",
    "mistral3": "llama",
    "muse_spark": "muse_spark_text",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
"""The type of the language model inside a multimodal one."""


def names() -> list[str]:
    """Every module that may have a model."""
    return sorted(module.name for module in pkgutil.iter_modules(classes.__path__))


def config_of(name: str) -> dict[str, Any]:
    """A config.json of this class."""
    common = COMMON | OWN.get(name, {})
    if name in _NO_TYPES:
        common = {key: value for key, value in common.items() if key != "layer_types"}
    if name in INNER:
        return {"model_type": name, "text_config": common | {"model_type": INNER[name]}, "vocab_size": VOCAB}
    return common | {"model_type": name}
