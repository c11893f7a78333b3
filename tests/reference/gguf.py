"""SmolLM2's weights and vocabulary out of a GGUF file, as a folder in the layout of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GROUP = 32
_SPECIAL = 3
"""The kind of token that GGUF calls a control token."""


def write_folder(source: Path, folder: Path) -> None:
    loaded: Any = mx.load(str(source), return_metadata=True)
    arrays, told = loaded
    told = {key: value.tolist() if isinstance(value, mx.array) else value for key, value in told.items()}
    heads, kv_heads = told["llama.attention.head_count"], told["llama.attention.head_count_kv"]
    weights = {}
    for name in arrays:
        stem, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        array = _whole(arrays, stem)
        if stem.endswith((".attn_q", ".attn_k")):
            array = _paired(array, heads if stem.endswith("q") else kv_heads)
        weights[f"{_renamed(stem)}.weight"] = array.astype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    width = told["llama.embedding_length"]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "head_dim": width // heads,
        "intermediate_size": told["llama.feed_forward_length"],
        "num_hidden_layers": told["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": told["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": told["llama.rope.freq_base"],
        "max_position_embeddings": told["llama.context_length"],
        "vocab_size": told["llama.vocab_size"],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "eos_token_id": told["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(told, folder)


def _renamed(stem: str) -> str:
    if stem in _WHOLE:
        return _WHOLE[stem]
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}"


def _whole(arrays: Mapping[str, mx.array], stem: str) -> mx.array:
    array = arrays[f"{stem}.weight"]
    if f"{stem}.scales" not in arrays:
        return array
    scales = arrays[f"{stem}.scales"]
    bits = array.shape[1] * 32 // (scales.shape[1] * _GROUP)
    return mx.dequantize(array, scales, arrays[f"{stem}.biases"], group_size=_GROUP, bits=bits)


def _paired(array: mx.array, heads: int) -> mx.array:
    """Rows as transformers rotates them: halves of a head, where GGUF has neighbours."""
    rows, width = array.shape
    return array.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _write_tokenizer(told: Mapping[str, Any], folder: Path) -> None:
    words = told["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in told["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, told["tokenizer.ggml.token_type"], strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": words[told["tokenizer.ggml.eos_token_id"]],
        "bos_token": words[told["tokenizer.ggml.bos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "chat_template": told["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
