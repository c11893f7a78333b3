"""The basis that a calibrated codec quantises in: what varies more has longer words, and less is lost for it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from warmkv_server.engine.cache.codecs.transform import Basis, Floats, TransformCodec
from warmkv_server.engine.model.basis import calibrated, hadamard
from warmkv_server.engine.model.statistics import StreamSample

HEADS, TOKENS = 2, 400
BITS = 4


def sample(spread: Floats, seed: int = 0) -> StreamSample:
    """Of no model: values that spread so in some directions, far from zero."""
    random = np.random.default_rng(seed)
    dims = len(spread)
    axes = np.stack([np.linalg.qr(np.random.default_rng(head).normal(size=(dims, dims)))[0] for head in range(HEADS)])
    values = random.normal(size=(HEADS, TOKENS, dims)) * spread @ axes.swapaxes(1, 2) + 5
    return StreamSample(values, values[:, :8] * 3, np.arange(TOKENS))


def lost(basis: Basis, spread: Floats, group_size: int) -> float:
    """Of other values that are alike, by their square."""
    codec = TransformCodec("o", BITS, group_size, basis, "made-up")
    x = mx.array(sample(spread, seed=1).values[None], dtype=mx.float32)
    return float(mx.square(codec.decode(codec.encode(x, 1), mx.float32, 1) - x).mean())


@pytest.mark.parametrize(("dims", "group_size"), [(64, 64), (128, 64), (96, 96), (64, 32)])
def test_what_varies_more_has_longer_words_and_less_is_lost(dims: int, group_size: int) -> None:
    steep = np.logspace(0, -2, dims)
    found = calibrated(sample(steep), None, BITS)
    assert found.bits.sum(axis=1).tolist() == [dims * (BITS + 0.25)] * HEADS
    assert (np.diff(found.bits, axis=1) <= 0).all()
    assert found.bits[0, 0] > BITS > found.bits[0, -1]
    # With words of one length it was 0.40 of it.
    assert lost(found, steep, group_size) < 0.25 * lost(hadamard(sample(steep), None, BITS), steep, group_size)


@pytest.mark.parametrize(("dims", "bits"), [(80, 4), (64, 8)])
def test_words_have_one_length_where_parts_have_no_whole_bytes_or_none_is_longer(dims: int, bits: int) -> None:
    assert set(calibrated(sample(np.logspace(0, -2, dims)), None, bits).bits.flat) == {bits}


def test_what_varies_evenly_has_words_of_about_one_length() -> None:
    assert calibrated(sample(np.ones(64)), None, BITS).bits[0, ::16].tolist() == [5, 4, 4, 4]
