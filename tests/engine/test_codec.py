"""Quantising first: what attention reads is what is stored, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.spans import distance, equal
from warmkv_server.engine.cache.codecs import cuda
from warmkv_server.engine.cache.codecs.affine import AffineCodec, kernel_reads_back
from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.cache.codecs.codec import (
    KEYS,
    VALUES,
    Codec,
    CodecPlan,
    LayerCodec,
    apart,
    restored,
    storable,
    stored_as,
)

DTYPES = (mx.float32, mx.float16, mx.bfloat16)

codecs = st.builds(AffineCodec, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 64, 128]))
dtypes = st.sampled_from(DTYPES)
scales = st.sampled_from([0.0, 1e-3, 1.0, 300.0])


@st.composite
def values(draw: st.DrawFn, codec: AffineCodec, dtype: mx.Dtype) -> mx.array:
    """Keys or values: (rows, heads, tokens, head_dim), some of them constant along a group."""
    shape = [draw(st.integers(1, 3)) for _ in range(3)] + [codec.group_size * draw(st.integers(1, 3))]
    noise = mx.random.normal(shape, key=mx.random.key(draw(st.integers(0, 2**32))))
    return (noise * draw(scales) + draw(st.sampled_from([0.0, -2.5]))).astype(dtype)


@settings(deadline=None)
@given(st.data(), codecs, dtypes)
def test_decoding_is_stock_dequantisation(data: st.DataObject, codec: AffineCodec, dtype: mx.Dtype) -> None:
    x = data.draw(values(codec, dtype))
    words, scales, biases = codec.encode(x)
    stock = mx.dequantize(
        words, scales.astype(dtype), biases.astype(dtype), group_size=codec.group_size, bits=codec.bits
    )
    assert equal(codec.decode((words, scales, biases), dtype), stock)


@settings(deadline=None)
@given(st.data(), codecs, dtypes)
def test_scales_take_sixteen_bits_and_lose_less_than_a_step(
    data: st.DataObject, codec: AffineCodec, dtype: mx.Dtype
) -> None:
    x = data.draw(values(codec, dtype))
    words = codec.encode(x)
    assert all(part.dtype in (mx.float16, mx.bfloat16) for part in words[1:])
    bits_a_value = sum(part.nbytes for part in words) * 8 / x.size
    assert bits_a_value == codec.bits + 32 / codec.group_size
    grouped = x.astype(mx.float32).reshape(-1, codec.group_size)
    spread = (grouped.max(axis=-1) - grouped.min(axis=-1)).max().item()
    largest = mx.abs(grouped).max().item()
    # A step of the grid, and what 16 bits round off of a scale, a bias and the value itself.
    bound = spread / (2**codec.bits - 1) + largest * 2.0 ** (-6 if dtype == mx.bfloat16 else -9)
    assert distance(codec.decode(words, dtype).astype(mx.float32), x.astype(mx.float32)) <= bound


@settings(deadline=None)
@given(st.data(), codecs, dtypes)
def test_cutting_by_token_changes_nothing(data: st.DataObject, codec: AffineCodec, dtype: mx.Dtype) -> None:
    x = data.draw(values(codec, dtype))
    token = data.draw(st.integers(0, x.shape[2] - 1))
    whole = codec.encode(x)
    alone = codec.encode(x[:, :, token : token + 1])
    for part, single in zip(whole, alone, strict=True):
        assert equal(part[:, :, token : token + 1], single)
    assert equal(codec.decode(whole, dtype)[:, :, token : token + 1], codec.decode(alone, dtype))


@settings(deadline=None)
@given(st.data(), st.integers(1, 200), dtypes)
def test_without_bits_values_are_stored_as_they_are(data: st.DataObject, width: int, dtype: mx.Dtype) -> None:
    codec = AsComputed()
    x = data.draw(values(AffineCodec(group_size=width), dtype))
    (stored,) = codec.encode(x)
    assert equal(stored, x)
    assert equal(codec.decode((stored,), dtype), x)


@pytest.mark.parametrize("dtype", [*DTYPES, mx.uint32])
def test_every_stored_dtype_is_one_that_numpy_has(dtype: mx.Dtype) -> None:
    array = (mx.random.normal((3, 5)) * 100).astype(dtype)
    stored = storable(array)
    assert np.array(stored).nbytes == array.nbytes
    assert stored.dtype != mx.bfloat16
    assert equal(restored(stored, dtype), array)


def test_quantising_again_is_not_needed_to_store() -> None:
    """Decoded values quantise to other words: which is why the words themselves are kept."""
    codec = AffineCodec()
    words = codec.encode(mx.random.normal((1, 2, 64, 64), key=mx.random.key(0)))
    again = codec.encode(codec.decode(words, mx.float32))
    assert not equal(again[0], words[0])


@settings(deadline=None)
@given(st.data(), codecs, dtypes)
def test_what_is_read_back_is_what_the_words_will_give(
    data: st.DataObject, codec: AffineCodec, dtype: mx.Dtype
) -> None:
    """One after the other or in one operation, of one shape or of two: the bits are those of each by itself."""
    keys, others = data.draw(values(codec, dtype)), data.draw(values(codec, dtype))
    for pair in ((keys, keys[::-1] * 0.5), (keys, others)):
        for layer in (LayerCodec(codec, codec), LayerCodec(codec, AsComputed()), LayerCodec(AsComputed(), codec)):
            computed, *read = layer.read_back(*pair, 0)
            words = apart(layer.encode(*pair, 0))
            made = apart(layer.words_of(computed, 0))
            decoded = layer.decode(layer.encode(*pair, 0), dtype, 0)
            for side, own in enumerate((layer.keys, layer.values)):
                alone = own.encode(pair[side], 0)
                assert all(equal(*each) for each in zip(words[side], alone, strict=True))
                assert all(equal(*each) for each in zip(made[side], alone, strict=True))
                assert equal(read[side], own.decode(alone, dtype, 0))
                assert equal(decoded[side], read[side])


@settings(deadline=None)
@given(st.data(), codecs, dtypes)
def test_words_are_as_they_are_said_to_be(data: st.DataObject, codec: AffineCodec, dtype: mx.Dtype) -> None:
    x = data.draw(values(codec, dtype))
    told: list[Codec] = [codec, AsComputed()]
    for each in told:
        for words, component in zip(each.encode(x, 0), each.components(x.shape[-1], dtype), strict=True):
            assert words.shape == (*x.shape[:-1], component.width)
            assert words.dtype == component.dtype
            assert str(np.array(storable(words)).dtype) == stored_as(component.dtype)


def test_a_layer_can_be_coded_unlike_the_others() -> None:
    plan = CodecPlan(AffineCodec(4), {(1, KEYS): AffineCodec(8), (2, VALUES): AsComputed()})
    assert plan.of_layer(0) == LayerCodec(AffineCodec(4), AffineCodec(4))
    assert plan.of_layer(1) == LayerCodec(AffineCodec(8), AffineCodec(4))
    assert plan.of_layer(2) == LayerCodec(AffineCodec(4), AsComputed())


def test_the_fingerprint_tells_plans_apart_and_has_no_more_than_bits_and_group_size_where_they_say_it_all() -> None:
    """Directories that were written when nothing else could be chosen have those two fields."""
    assert codecs_for(4, 64).fingerprint_fields() == {"kv_bits": "4", "kv_group_size": "64"}
    assert codecs_for(8, 32).fingerprint_fields() == {"kv_bits": "8", "kv_group_size": "32"}
    assert codecs_for(0, 64).fingerprint_fields() == {"kv_bits": "0", "kv_group_size": "0"}
    plans = [
        codecs_for(),
        CodecPlan(AffineCodec(), {(0, KEYS): AffineCodec(8)}),
        CodecPlan(AffineCodec(), {(0, VALUES): AffineCodec(8)}),
        CodecPlan(AffineCodec(), {(1, KEYS): AffineCodec(8)}),
        CodecPlan(AffineCodec(), {(0, KEYS): AsComputed()}),
    ]
    assert len({str(plan.fingerprint_fields()) for plan in plans}) == len(plans)


@pytest.mark.skipif(not cuda.is_available(), reason="needs CUDA")
def test_one_kernel_reads_back_where_scales_are_stored_as_they_are() -> None:
    assert all(kernel_reads_back(AffineCodec(bits), dtype) for bits in (4, 8) for dtype in (mx.float16, mx.bfloat16))
