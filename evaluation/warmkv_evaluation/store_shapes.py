"""The KV geometry of real models, without their weights.

A model of mlx-lm's own class with the layers, heads and windows of the real one and next to no width elsewhere has the
same caches, so what is discovered on it is what would be discovered on the real one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from warmkv_server.contract.kv import PartKind
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.cache.layout import CacheMap
from warmkv_server.engine.model import device
from warmkv_server.engine.model import load as models
from warmkv_server.engine.model.discover import discover
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.errors import OperatorError

BUILTIN = "builtin:tiny"
FP16_BYTES = 2

_NARROW = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gemma-3-12b": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": None,
        "rope_scaling": {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
    },
}

SHAPES = (BUILTIN, *_CONFIGS)


@dataclass(frozen=True)
class Shape:
    """The caches of one model, and how they are stored."""

    name: str
    model: Any
    cache_map: CacheMap
    group_size: int

    def held(self, tokens: int) -> dict[PartKind, int]:
        """Tokens that attention looks back on, of a context of so many."""
        return {PartKind.APPEND: tokens, PartKind.WINDOW: min(tokens, self.cache_map.layout.window)}

    def fp16_bytes(self, tokens: int) -> int:
        """The same keys and values in 16 bits each, each windowed layer with its window and no more."""
        held = self.held(tokens)
        return FP16_BYTES * sum(
            held[stack.kind] * len(stack.streams) * stack.heads * stack.head_dim for stack in self.cache_map.stacks
        )


def shape_of(name: str, group_size: int = 64) -> Shape:
    """One of SHAPES, its KV in 4 bits with groups of `group_size`.

    Raises:
        OperatorError: there is no such shape.
    """
    device.prepare()
    codecs = codecs_for(4, group_size)
    if name == BUILTIN:
        loaded = models.load(BUILTIN, adapter=None, codecs=codecs, context_limit=None)
        return Shape(name, loaded.model, loaded.cache_map, group_size)
    if name not in _CONFIGS:
        raise OperatorError(f"there is no shape {name!r}; known are {', '.join(SHAPES)}")
    config = _NARROW | _CONFIGS[name]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    # As served: on a CPU 16-bit models are computed in 32 bits.
    model.set_dtype(mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)
    mx.eval(model.parameters())
    return Shape(name, model, discover(ModelRunner(model), codecs), group_size)
