"""The model's shape, as the `config.json` that mlx-lm's `llama` class reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .tokenizer import BOS_ID, END_ID, PAD_ID


@dataclass(frozen=True)
class Shape:
    """Sizes in values, not bytes. ``hidden`` must be ``heads * head_dim``."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 608
    head_dim: int = 64
    positions: int = 32_768
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5

    def config(self) -> dict[str, object]:
        """The content of `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.feed_forward,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": BOS_ID,
            "eos_token_id": END_ID,
            "pad_token_id": PAD_ID,
            "torch_dtype": "float16",
        }

    def write(self, folder: Path) -> None:
        """Write `config.json` and `generation_config.json`."""
        _write_json(folder / "config.json", self.config())
        _write_json(
            folder / "generation_config.json",
            {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False},
        )


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
