"""A model whose keys have outliers gets a codec that does for it; others get what was asked for."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models import qwen2

from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.cache.codecs.codec import KEYS
from warmkv_server.engine.model.calibration import TOKENS, refined
from warmkv_server.engine.model.discover import discover
from warmkv_server.engine.model.runner import ModelRunner

LAYERS, HALF = 3, 32
TEXT = list(range(TOKENS))


def runner(bias: float, layer: int = 1) -> ModelRunner:
    """Of random weights; the keys of one layer have this bias in their slowest pair, as Qwen2's have."""
    mx.random.seed(7)
    config: dict[str, Any] = {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 1_000_000.0,
    }
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.1, model.parameters()))
    planted = mx.zeros(2 * HALF)
    planted[HALF - 1], planted[2 * HALF - 1] = bias, -bias
    model.layers[layer].self_attn.k_proj.bias = planted
    mx.eval(model.parameters())
    return ModelRunner(model)


def test_an_ordinary_model_keeps_its_codec(caplog: pytest.LogCaptureFixture) -> None:
    asked = codecs_for(4, 64)
    assert refined(runner(0.0), asked, TEXT) is asked
    assert not caplog.records


@pytest.mark.parametrize(("bias", "exact"), [(6.0, False), (120.0, True)])
def test_outliers_are_kept_finer_and_named(bias: float, exact: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = runner(bias)
    with caplog.at_level(logging.WARNING):
        plan = refined(model, codecs_for(4, 64), TEXT)
    assert (plan.bits, dict(plan.streams)) == (8, {(1, KEYS): AsComputed()} if exact else {})
    assert "4 bits don't do for this model" in caplog.text
    assert "keys of cache 1;" in caplog.text
    asked = codecs_for(4, 64).fingerprint_fields()
    assert plan.fingerprint_fields() != asked
    layout = discover(model, plan).layout
    assert {name for spec in layout.tensors for name in spec.codecs} == {"affine-8-64"}
    assert any(not spec.codecs for spec in layout.tensors) == exact


def test_what_is_not_coded_is_not_looked_at() -> None:
    asked = codecs_for(0)
    assert refined(runner(120.0), asked, TEXT) is asked


def test_a_text_without_tokens_says_nothing() -> None:
    asked = codecs_for(4, 64)
    assert refined(runner(120.0), asked, [5]) is asked
