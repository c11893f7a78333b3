"""A model with exchanged modules is the same model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import LayerNorm, RMSNorm
from mlx.nn.layers.positional_encoding import RoPE
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from warmkv_server.engine.model import random_model
from warmkv_server.engine.model.cpu_modules import RowEmbedding, RowLinear, RowRMSNorm, TableRoPE, exchange_modules

POSITIONS = 4096


class Wrapped(Module):
    def __init__(self, *modules: Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules_ = list(modules)


def exchanged(module: Module, positions: int = POSITIONS) -> Any:
    holder = Wrapped(module)
    exchange_modules(holder, positions)
    return holder.modules_[0]


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from([32, 64, 96]),
    head_dim=st.sampled_from([96, 128]),
    base=st.sampled_from([10000.0, 500000.0]),
    scale=st.sampled_from([1.0, 0.125, 0.3]),
    offsets=st.lists(st.integers(0, POSITIONS - 1), min_size=1, max_size=3),
    tokens=st.integers(1, 300),
)
def test_a_looked_up_rotation_has_the_bits_of_the_computed_one(
    dims: int, head_dim: int, base: float, scale: float, offsets: list[int], tokens: int
) -> None:
    stock: Any = RoPE(dims, base=base, scale=scale)
    ours = exchanged(stock)
    assert isinstance(ours, TableRoPE)
    offsets = [min(offset, POSITIONS - tokens) for offset in offsets]
    x = mx.random.normal((len(offsets), 2, tokens, head_dim), key=mx.random.key(tokens))
    assert mx.array_equal(ours(x, offset=offsets[0]), stock(x, offset=offsets[0]))
    each = mx.array(offsets)
    assert mx.array_equal(ours(x, offset=each), stock(x, offset=each))


@pytest.mark.parametrize("stock", [RoPE(64, traditional=True), LayerNorm(64)], ids=["traditional", "layer norm"])
def test_what_has_no_counterpart_stays(stock: Module) -> None:
    assert exchanged(stock) is stock


def test_a_table_of_too_many_positions_is_not_made() -> None:
    stock = RoPE(128)
    assert exchanged(stock, 1 << 20) is stock


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_row_is_normalised_as_by_the_stock_way(size: float) -> None:
    stock = RMSNorm(256, eps=1e-5)
    stock.weight = mx.random.normal((256,))
    ours = exchanged(stock)
    assert isinstance(ours, RowRMSNorm)
    rows = size * mx.random.normal((8, 1, 256))
    assert mx.allclose(ours(rows), stock(rows), rtol=1e-5, atol=1e-6)
    chunk = size * mx.random.normal((1, 8, 256))
    assert mx.array_equal(ours(chunk), stock(chunk))


SHAPES = [(1, 1, 96), (3, 1, 96), (1, 5, 96), (96, 1, 96), (1, 96), (96,), (1, 1, 1, 96)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_has_the_bits_of_the_stock_one(shape: tuple[int, ...], bias: bool) -> None:
    stock = Linear(96, 160, bias=bias)
    ours = exchanged(stock)
    assert isinstance(ours, RowLinear)
    x = mx.random.normal(shape, key=mx.random.key(2))
    assert ours(x).shape == stock(x).shape
    assert mx.array_equal(ours(x), stock(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_embedding_is_looked_up_and_multiplied_as_before(shape: tuple[int, ...]) -> None:
    stock = Embedding(160, 96)
    ours: Any = exchanged(stock)
    assert isinstance(ours, RowEmbedding)
    assert mx.array_equal(ours(mx.array([[3, 159]])), stock(mx.array([[3, 159]])))
    x = mx.random.normal(shape, key=mx.random.key(2))
    assert mx.array_equal(ours.as_linear(x), stock.as_linear(x))


def test_a_rotation_of_one_place_serves_heads_of_any_number() -> None:
    stock: Any = RoPE(64)
    ours = exchanged(stock)
    for offset in (7, 7, 8):
        for shape in ((1, 4, 1, 64), (1, 2, 1, 64), (1, 2, 3, 64)):
            x = mx.random.normal(shape, key=mx.random.key(offset))
            assert mx.array_equal(ours(x, offset=offset), stock(x, offset=offset))


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_the_models_logits_stay_what_they_are(shape: str) -> None:
    model, _ = random_model.build(shape)
    model.set_dtype(mx.float32)
    tokens = mx.random.randint(0, 4096, (1, 40), key=mx.random.key(1))
    before = logits(model, tokens)
    parameters = named(model)
    exchange_modules(model, POSITIONS)
    assert named(model) == parameters
    assert mx.allclose(logits(model, tokens), before, rtol=0, atol=1e-4)


def logits(model: Module, tokens: mx.array) -> mx.array:
    """Of a chunk, then of single steps."""
    cache = make_prompt_cache(model)
    first = model(tokens[:, :32], cache=cache)
    rest = [model(tokens[:, at : at + 1], cache=cache) for at in range(32, 40)]
    return mx.concatenate([first, *rest], axis=1)


def named(model: Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters."""
    parameters: Any = tree_flatten(model.parameters())
    return {name: array.shape for name, array in parameters}
