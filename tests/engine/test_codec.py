"""Quantising first: what attention reads is what is stored, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.spans import distance, equal
from warmkv_server.engine.cache import cuda_codec
from warmkv_server.engine.cache.codec import Codec, kernel_reads_back, restored, storable

DTYPES = (mx.float32, mx.float16, mx.bfloat16)

codecs = st.builds(Codec, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 64, 128]))
dtypes = st.sampled_from(DTYPES)
scales = st.sampled_from([0.0, 1e-3, 1.0, 300.0])


@st.composite
def values(draw: st.DrawFn, codec: Codec, dtype: mx.Dtype) -> mx.array:
    """Keys or values: (rows, heads, tokens, head_dim), some of them constant along a group."""
    shape = [draw(st.integers(1, 3)) for _ in range(3)] + [codec.group_size * draw(st.integers(1, 3))]
    noise = mx.random.normal(shape, key=mx.random.key(draw(st.integers(0, 2**32))))
    return (noise * draw(scales) + draw(st.sampled_from([0.0, -2.5]))).astype(dtype)


@settings(deadline=None)
@given(st.data(), codecs, dtypes)
def test_decoding_is_stock_dequantisation(data: st.DataObject, codec: Codec, dtype: mx.Dtype) -> None:
    x = data.draw(values(codec, dtype))
    words, scales, biases = codec.encode(x)
    stock = mx.dequantize(
        words, scales.astype(dtype), biases.astype(dtype), group_size=codec.group_size, bits=codec.bits
    )
    assert equal(codec.decode((words, scales, biases), dtype), stock)


@settings(deadline=None)
@given(st.data(), codecs, dtypes)
def test_scales_take_sixteen_bits_and_lose_less_than_a_step(data: st.DataObject, codec: Codec, dtype: mx.Dtype) -> None:
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
def test_cutting_by_token_changes_nothing(data: st.DataObject, codec: Codec, dtype: mx.Dtype) -> None:
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
    codec = Codec(bits=0)
    x = data.draw(values(Codec(group_size=width), dtype))
    (stored,) = codec.encode(x)
    assert equal(stored, x)
    assert equal(codec.decode((stored,), dtype), x)
    assert codec.components == ("values",)


@pytest.mark.parametrize("dtype", [*DTYPES, mx.uint32])
def test_every_stored_dtype_is_one_that_numpy_has(dtype: mx.Dtype) -> None:
    array = (mx.random.normal((3, 5)) * 100).astype(dtype)
    stored = storable(array)
    assert np.array(stored).nbytes == array.nbytes
    assert stored.dtype != mx.bfloat16
    assert equal(restored(stored, dtype), array)


def test_quantising_again_is_not_needed_to_store() -> None:
    """Decoded values quantise to other words: which is why the words themselves are kept."""
    codec = Codec()
    words = codec.encode(mx.random.normal((1, 2, 64, 64), key=mx.random.key(0)))
    again = codec.encode(codec.decode(words, mx.float32))
    assert not equal(again[0], words[0])


@settings(deadline=None)
@given(st.data(), codecs, dtypes)
def test_what_is_read_back_is_what_the_words_will_give(data: st.DataObject, codec: Codec, dtype: mx.Dtype) -> None:
    """One after the other or in one operation, of one shape or of two: the bits are those of each by itself."""
    keys, others = data.draw(values(codec, dtype)), data.draw(values(codec, dtype))
    for pair in ((keys, keys[::-1] * 0.5), (keys, others)):
        computed, *read = codec.read_back(*pair)
        words = codec.apart(codec.encode_both(*pair))
        assert all(equal(*each) for each in zip(codec.encode_computed(computed), codec.encode_both(*pair), strict=True))
        for x, each, component in zip(pair, read, words, strict=True):
            assert equal(each, codec.decode(codec.encode(x), dtype))
            assert equal(each, codec.decode(component, dtype))


@pytest.mark.skipif(not cuda_codec.is_available(), reason="needs CUDA")
def test_one_kernel_reads_back_where_scales_are_stored_as_they_are() -> None:
    assert all(kernel_reads_back(Codec(bits), dtype) for bits in (4, 8) for dtype in (mx.float16, mx.bfloat16))
