"""The KV that a model with an adapter computed is that adapter's alone."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from tests.e2e.harness import serving, some_tokens, token_ids
from warmkv import v1

KEYS = "self_attn.k_proj"
LAYERS, HIDDEN, KV_WIDTH, RANK = 4, 256, 128, 4
"""Of the built-in model, and of the adapters."""


def write_adapter(folder: Path, seed: int) -> Path:
    """Random LoRA weights for the keys of every layer."""
    folder.mkdir()
    lora = {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": [KEYS]}
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.random.seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for half, shape in (("lora_a", (HIDDEN, RANK)), ("lora_b", (RANK, KV_WIDTH))):
            weights[f"model.layers.{layer}.{KEYS}.{half}"] = mx.random.normal(shape)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


def test_another_adapter_or_none_is_a_miss_and_the_first_is_warm_again(tmp_path: Path) -> None:
    first, second = (write_adapter(tmp_path / f"adapter{seed}", seed) for seed in (1, 2))
    with serving(tmp_path / "data", "--adapter", str(first)) as (_, client):
        client.prime("a", token_ids(some_tokens(300)))
        hot = client.generate("a", token_ids([301]), ephemeral=True)
        assert hot.cache.source == v1.CACHE_SOURCE_HOT
        fingerprints = {client.info().fingerprint}
    for flags in (["--adapter", str(second)], []):
        with serving(tmp_path / "data", *flags) as (_, client):
            fingerprints.add(client.info().fingerprint)
            assert client.get("a").token_count == 300
            cold = client.generate("a", token_ids([301]), ephemeral=True)
            assert (cold.cache.source, cold.cache.prefilled_tokens) == (v1.CACHE_SOURCE_COLD, 301)
            assert cold.cache.fallback_reason == v1.FALLBACK_REASON_FINGERPRINT
            assert cold.tokens != hot.tokens
    assert len(fingerprints) == 3
    with serving(tmp_path / "data", "--adapter", str(first)) as (_, client):
        assert client.info().fingerprint in fingerprints
        warm = client.generate("a", token_ids([301]), ephemeral=True)
        assert (warm.cache.source, warm.cache.warm_tokens) == (v1.CACHE_SOURCE_WARM, 300)
        assert warm.cache.fallback_reason == v1.FALLBACK_REASON_UNSPECIFIED
        assert warm.tokens == hot.tokens
