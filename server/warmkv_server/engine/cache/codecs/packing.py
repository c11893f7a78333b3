"""Whole numbers of a few bits in words of 32, as MLX packs them: one behind the other, the lowest bits first."""

from __future__ import annotations

import mlx.core as mx

_TOGETHER = 8
"""Numbers that fill whole bytes, however wide they are."""


def packed(numbers: mx.array, bits: int) -> mx.array:
    """Numbers of type uint8 along the last axis, of which as many as fill whole words."""
    if bits == 8:
        octets = numbers
    elif bits == 4:
        octets = numbers[..., ::2] | (numbers[..., 1::2] << 4)
    else:
        together = numbers.reshape(*numbers.shape[:-1], -1, _TOGETHER).astype(mx.uint64)
        shifted = together << (mx.arange(_TOGETHER, dtype=mx.uint64) * bits)
        octets = shifted.sum(axis=-1, keepdims=True).view(mx.uint8)[..., :bits].flatten(-2)
    return mx.contiguous(octets).view(mx.uint32)


def unpacked(words: mx.array, bits: int) -> mx.array:
    """The numbers, of type uint8."""
    octets = words.view(mx.uint8)
    if bits == 8:
        return octets
    if bits == 4:
        return mx.stack([octets & 15, octets >> 4], axis=-1).flatten(-2)
    together = octets.reshape(*octets.shape[:-1], -1, bits).astype(mx.uint64)
    joined = (together << (mx.arange(bits, dtype=mx.uint64) * 8)).sum(axis=-1, keepdims=True)
    numbers = joined >> (mx.arange(_TOGETHER, dtype=mx.uint64) * bits)
    return (numbers & ((1 << bits) - 1)).astype(mx.uint8).flatten(-2)
