"""A change of basis before quantising: what is read is what the words give, however many are read at once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.positional_encoding import RoPE
from mlx_lm.models import rope_utils

from tests.engine.spans import distance, equal
from warmkv_server.engine.cache.codecs import packing
from warmkv_server.engine.cache.codecs.codec import LayerCodec, apart, join_tokens
from warmkv_server.engine.cache.codecs.rotation import Rotation, UnknownRotationError
from warmkv_server.engine.cache.codecs.transform import WHOLE, Basis, TransformCodec, whole
from warmkv_server.engine.model.cpu_modules import Table, TableRoPE

POSITIONS = 512
HEADS = 2

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 0.7, "mscale_all_dim": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
ROTATIONS: dict[str, Any] = {
    "halves": lambda dims: RoPE(dims),
    "neighbours": lambda dims: RoPE(dims, traditional=True),
    "a quarter": lambda dims: RoPE(dims // 4),
    "scaled": lambda dims: RoPE(dims, scale=0.25),
    "tables": lambda dims: TableRoPE(dims, Table(POSITIONS, dims, 10000.0, 1.0)),
    "yarn": lambda dims: rope_utils.initialize_rope(dims, 10000.0, False, YARN, POSITIONS),
    "llama3": lambda dims: rope_utils.initialize_rope(dims, 10000.0, False, LLAMA3, POSITIONS),
    "longrope": lambda dims: rope_utils.SuScaledRoPE(
        dims, 10000.0, POSITIONS, 128, [1.0] * (dims // 2), [1.0 + i / dims for i in range(dims // 2)]
    ),
}


LENGTHS: dict[int, tuple[int, ...]] = {3: (5, 3, 3, 2), 4: (6, 4, 4, 3), 5: (7, 5, 5, 4), 6: (8, 7, 6, 4), 8: (8,)}
"""Of words, in parts of a head."""


def basis(dims: int, bits: int, seed: int = 0) -> Basis:
    """Of no model: matrices that stretch some directions a hundred times as much as others, and large means."""
    random = np.random.default_rng(seed)
    stretch = np.logspace(-1, 1, dims)
    back = np.stack([np.linalg.qr(random.normal(size=(dims, dims)))[0] * stretch for _ in range(HEADS)])
    lengths = np.array(LENGTHS[bits] if dims % 32 == 0 else (bits,), dtype=np.float64)
    if seed % 2:
        lengths = np.sort(lengths)
    means = (random.normal(size=(HEADS, dims)) * 5, random.normal(size=(HEADS, dims)) * 50)
    return Basis.of(np.repeat(lengths, dims // len(lengths)), back, *means)


def codec(dims: int, bits: int = 4, group_size: int = 64, seed: int = 0, **options: Any) -> TransformCodec:
    return TransformCodec("o", bits, group_size, basis(dims, bits, seed), "made-up", **options)


def values(dims: int, tokens: int, rows: int = 1, seed: int = 0) -> mx.array:
    return mx.random.normal((rows, HEADS, tokens, dims), loc=2.0, scale=3.0, key=mx.random.key(seed))


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_is_found_out_and_undone(name: str) -> None:
    module = ROTATIONS[name](64)
    rotation = Rotation.of(module, 64, POSITIONS)
    x = values(64, 40)
    for start in (0, 3, POSITIONS - 40):
        turned = module(x, offset=start)
        assert distance(rotation.turn(x, start), turned) < 1e-4
        assert distance(rotation.turn_back(turned, start), x) < 1e-4


def test_what_does_something_else_than_rotate_is_told() -> None:
    def by_content(x: mx.array, offset: int = 0) -> mx.array:
        return x * (1 + offset) + x.mean(axis=-1, keepdims=True)

    def by_length(x: mx.array, offset: int = 0) -> mx.array:
        return x * (x.shape[-2] + 0 * offset)

    for module in (by_content, by_length):
        with pytest.raises(UnknownRotationError):
            Rotation.of(module, 64, POSITIONS)
    with pytest.raises(UnknownRotationError, match="too large"):
        Rotation.of(RoPE(256), 256, 1 << 20)


@pytest.mark.parametrize("bits", [(1,), (2,), (3,), (4,), (5,), (6,), (7,), (8,), (6, 4, 4, 3), (3, 8, 1, 5)])
def test_numbers_come_back_from_as_few_bits_as_they_have(bits: tuple[int, ...]) -> None:
    one = np.repeat(bits, 32 // len(bits))
    lengths = np.stack([one, one, one[::-1]])
    most = mx.array(2**lengths)[:, None]
    numbers = (mx.random.uniform(shape=(2, 3, 5, 32), key=mx.random.key(0)) * most).astype(mx.uint8)
    heads = packing.widths(lengths)
    words = packing.packed(numbers, heads)
    assert words.shape[-1] == one.sum() // 8
    assert equal(packing.unpacked(words, heads), numbers)


def test_every_sum_of_a_product_is_exact() -> None:
    back = basis(128, 8).back
    power = np.exp2(np.floor(np.log2(np.abs(back).max(axis=-2, keepdims=True) / (WHOLE + 1)))) / 2
    numbers = back / power
    assert np.array_equal(numbers, np.round(numbers))
    assert 255 * WHOLE * 128 < 2**24  # in halves
    assert np.array_equal(whole(back), back)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    ("dims", "group_size", "bits"),
    [
        (64, 64, 4),
        (128, 64, 4),
        (256, 64, 4),
        (96, 96, 4),
        (80, 80, 4),
        (192, 64, 3),
        (64, 32, 5),
        (128, 128, 6),
        (64, 64, 8),
    ],
)
def test_what_is_read_does_not_depend_on_how_much_is_read_at_once(
    dims: int, group_size: int, bits: int, rotated: bool
) -> None:
    """Bit for bit: tokens one by one, in chunks, all together, and in a batch whose rows are at other positions."""
    rotation = Rotation.of(RoPE(dims), dims, POSITIONS) if rotated else None
    coder = codec(dims, bits, group_size, rotation=rotation)
    tokens = 40
    words = coder.encode(values(dims, tokens), 0)
    for component, part in zip(coder.components(dims, mx.float32), words, strict=True):
        assert (part.shape[-1], part.dtype) == (component.width, component.dtype)
    read = coder.decode(words, mx.float32, 0)
    for size in (1, 2, 3, 7, 16):
        for start in range(0, tokens - size + 1, size):
            piece = tuple(part[:, :, start : start + size] for part in words)
            assert equal(coder.decode(piece, mx.float32, start), read[:, :, start : start + size])
    starts = (0, 1, 5, 33)
    rows = tuple(mx.concatenate([part[:, :, at : at + 2] for at in starts]) for part in words)
    for given in (mx.array(starts), starts):
        batch = coder.decode(rows, mx.float32, given)
        for row, at in enumerate(starts):
            assert equal(batch[row : row + 1], read[:, :, at : at + 2])


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_step_reads_what_its_words_will_give(alike: bool, dtype: mx.Dtype) -> None:
    rotation = Rotation.of(RoPE(64), 64, POSITIONS)
    keys, others = codec(64, rotation=rotation), codec(64, 4 if alike else 5, seed=1)
    layer = LayerCodec(keys, others)
    x, y = values(64, 6).astype(dtype), values(64, 6, seed=1).astype(dtype)
    stepped, read = [], []
    for at in range(6):
        computed, *found = layer.read_back(x[:, :, at : at + 1], y[:, :, at : at + 1], at)
        stepped.append(computed)
        read.append(found)
    words = apart(layer.words_of(join_tokens(stepped), 0))
    for side, coder in enumerate((keys, others)):
        together = mx.concatenate([each[side] for each in read], axis=2)
        assert equal(coder.decode(words[side], dtype, 0), together)
    starts = mx.array([0, 4, 100])
    rows = [mx.concatenate([each[:, :, at : at + 1] for at in (0, 1, 2)]) for each in (x, y)]
    computed, *found = layer.read_back(rows[0], rows[1], starts)
    words = apart(layer.words_of(computed, starts))
    for side, coder in enumerate((keys, others)):
        assert equal(coder.decode(words[side], dtype, starts), found[side])


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_what_is_lost_is_a_part_of_a_step(bits: int) -> None:
    """Also of values that are all alike, or far from the mean."""
    coder = codec(64, bits, rotation=Rotation.of(RoPE(64), 64, POSITIONS))
    largest = mx.array(np.abs(coder.basis.back).sum(axis=-2))[None, :, None]
    for x in (values(64, 30), values(64, 30) * 100, mx.zeros((1, HEADS, 30, 64)), mx.ones((1, HEADS, 30, 64)) * 1000):
        into = np.linalg.inv(coder.basis.back)
        still = np.array(coder.rotation.turn_back(x, 1)) if coder.rotation else np.array(x)
        spread = np.abs((still - coder.basis.mean[None, :, None]) @ into[None]).max() * 2
        read = coder.decode(coder.encode(x, 1), mx.float32, 1)
        assert bool((mx.abs(read - x) <= 1.5 * spread / (2**bits - 1) * largest.max() + 1e-3).all())


def test_the_first_position_has_a_mean_of_its_own() -> None:
    coder = codec(64)
    first = mx.array(coder.basis.first)[None, :, None]
    later = mx.array(coder.basis.mean)[None, :, None]
    for start, x in ((0, first), (1, later)):
        assert distance(coder.decode(coder.encode(x, start), mx.float32, start), x) < 1e-3
    both = mx.concatenate([first, later], axis=2)
    assert distance(coder.decode(coder.encode(both, 0), mx.float32, 0), both) < 1e-3
