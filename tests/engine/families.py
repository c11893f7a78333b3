"""Models of mlx-lm's own classes with a few thousand random weights, one for each way of keeping a context."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

VOCAB = 320
WINDOW = 8
"""Tokens that the windowed layers look back on; less than a prefill chunk, as in no real model, to wrap often."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
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
}
_GATED_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.25,
}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        config: as in a config.json.
        kinds: of its caches in order: append, window or state.
        group_size: the KV group size that its dimensions divide by.
    """

    config: Mapping[str, Any]
    kinds: tuple[str, ...]
    group_size: int = 64


def _family(model_type: str, *kinds: str, group_size: int = 64, **own: Any) -> Family:
    return Family(_COMMON | own | {"model_type": model_type}, kinds, group_size)


FAMILIES: dict[str, Family] = {
    "llama": _family("llama", "append", "append"),
    "qwen3": _family("qwen3", "append", "append"),
    "phi3_head_dim_96": _family("phi3", "append", "append", hidden_size=192, head_dim=96, group_size=32),
    "qwen3_moe": _family(
        "qwen3_moe",
        "append",
        "append",
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=32,
        norm_topk_prob=True,
    ),
    "mixtral": _family("mixtral", "append", "append", hidden_size=128, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v2": _family(
        "deepseek_v2",
        "append",
        "append",
        **_DEEPSEEK,
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    ),
    "deepseek_v3": _family("deepseek_v3", "append", "append", **_DEEPSEEK, n_group=1, topk_group=1),
    "gemma3_text": _family(
        "gemma3_text",
        "window",
        "append",
        "window",
        "append",
        num_hidden_layers=4,
        sliding_window=WINDOW,
        sliding_window_pattern=2,
        query_pre_attn_scalar=64,
    ),
    "gemma4_shared_kv": _family(
        "gemma4_text",
        "window",
        "append",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        global_head_dim=128,
        sliding_window=WINDOW,
        sliding_window_pattern=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        tie_word_embeddings=True,
    ),
    "cohere2": _family(
        "cohere2",
        "window",
        "append",
        hidden_size=128,
        sliding_window=WINDOW,
        sliding_window_pattern=2,
        logit_scale=1.0,
    ),
    "gpt_oss_sinks": _family(
        "gpt_oss",
        "window",
        "append",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4_chunked": Family(
        {
            "model_type": "llama4",
            "text_config": _COMMON
            | {
                "model_type": "llama4_text",
                "num_hidden_layers": 4,
                "attention_chunk_size": WINDOW,
                "attention_bias": False,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 64,
                "num_experts_per_tok": 1,
                "num_local_experts": 2,
                "rope_scaling": None,
                "use_qk_norm": True,
            },
        },
        ("window", "window", "window", "append"),
    ),
    "qwen3_next": _family(
        "qwen3_next",
        "state",
        "append",
        "state",
        "append",
        **_GATED_DELTA,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[],
        moe_intermediate_size=32,
    ),
    "qwen3_5": _family(
        "qwen3_5",
        "state",
        "append",
        "state",
        "append",
        **_GATED_DELTA,
        rope_parameters={"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    ),
    "mamba2": _family(
        "mamba2",
        "state",
        "state",
        num_heads=4,
        head_dim=32,
        state_size=16,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        time_step_limit=[0.0, 100.0],
        time_step_rank="auto",
    ),
    "falcon_h1": _family(
        "falcon_h1",
        "state",
        "append",
        "state",
        "append",
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_d_conv=4,
        lm_head_multiplier=1.0,
    ),
}


def build(name: str) -> Any:
    """The family's model, with the same random weights every time."""
    config = FAMILIES[name].config
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(dict(config)))
    # Also what starts as zeros or ones (sinks, norms, biases), so that leaving it out would change the logits.
    model.update(tree_map(lambda weight: weight + 0.05 * mx.random.normal(weight.shape), model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model
