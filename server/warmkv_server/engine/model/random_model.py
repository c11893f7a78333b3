"""Models of real shapes with random weights: noise, for tests and benchmarks of geometry."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx

from warmkv_server.errors import OperatorError

SEED = 0

_SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 4},
    "llama-100m": {
        "model_type": "llama",
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "llama-8b": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 4},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "sliding_window": 512,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 64,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 3,
        "moe_intermediate_size": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 128,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "num_key_value_heads": 4,
    },
    "hybrid": {
        "model_type": "falcon_h1",
        "num_hidden_layers": 3,
        "mamba_d_ssm": 256,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
    },
}


def build(shape: str) -> tuple[Any, dict[str, Any]]:
    """A model of mlx-lm's own class with weights drawn from a fixed seed, and its config.

    Raises:
        OperatorError: for a shape that isn't known.
    """
    if shape not in SHAPES:
        raise OperatorError(f"there is no shape {shape!r} for --model random:SHAPE; known are {', '.join(SHAPES)}")
    config = _SMALL | SHAPES[shape]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(SEED)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    model.eval()
    mx.eval(model.parameters())
    return model, config
