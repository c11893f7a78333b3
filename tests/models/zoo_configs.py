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

OWN: dict[str, dict[str, Any]] = {}

INNER: dict[str, str] = {}


def names() -> list[str]:
    """Every module that may have a model."""
    return sorted(module.name for module in pkgutil.iter_modules(classes.__path__))


def config_of(name: str) -> dict[str, Any]:
    """A config.json of this class."""
    common = COMMON | OWN.get(name, {})
    if name in INNER:
        return {"model_type": name, "text_config": common | {"model_type": INNER[name]}, "vocab_size": VOCAB}
    return common | {"model_type": name}
