"""Quantising keys and values once, when they are computed.

Every attention reads the quantised value, also inside the chunk that computed it; only the quantised words are stored.
So KV that comes back from disk is what attention read the first time, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from warmkv_server.engine.cache import cuda_codec

Words = tuple[mx.array, ...]
"""One stream's stored components, each (rows, kv_heads, tokens, width): (words, scales, biases), or (values,)."""


@dataclass(frozen=True)
class Codec:
    """Turns keys or values of shape (rows, kv_heads, tokens, head_dim) into words and back.

    Attributes:
        bits: 4 or 8; 0 stores the values as they are.
        group_size: values along head_dim that share a scale and a bias.
    """

    bits: int = 4
    group_size: int = 64

    @property
    def components(self) -> tuple[str, ...]:
        return ("words", "scales", "biases") if self.bits else ("values",)

    def encode(self, x: mx.array) -> Words:
        if not self.bits:
            return (x,)
        words, scales, biases = mx.quantize(x, group_size=self.group_size, bits=self.bits)
        if scales.dtype == mx.float32:
            # Rounded before first use, so that 16 bits are all there is to store: 4.5 bits a value instead of 5.
            scales, biases = scales.astype(mx.float16), biases.astype(mx.float16)
        return words, scales, biases

    def decode(self, words: Words, dtype: mx.Dtype) -> mx.array:
        """The values that attention reads, in the model's dtype."""
        if not self.bits:
            return words[0]
        packed, scales, biases = words
        scales, biases = scales.astype(dtype), biases.astype(dtype)
        if dtype == mx.float32 and packed.shape[-2] == 1 and _product_decodes(self):
            return _decode_by_product(packed, scales, biases, self)
        if self.bits == 4 and dtype == mx.float32:
            return _decode_nibbles(packed, scales, biases, self.group_size)
        return mx.dequantize(packed, scales, biases, group_size=self.group_size, bits=self.bits)

    def encode_both(self, keys: mx.array, values: mx.array) -> Words:
        """Components of both, side by side along the axis of heads; or of keys and then of values if shapes differ."""
        if self.bits and keys.shape == values.shape:
            return self.encode(side_by_side(keys, values))  # half the operations
        return self.encode(keys) + self.encode(values)

    def apart(self, words: Words) -> tuple[Words, Words]:
        """Keys' and values' own components, of what `encode_both` gave."""
        count = len(self.components)
        if len(words) == count:
            heads = words[0].shape[1] // 2
            return tuple(part[:, :heads] for part in words), tuple(part[:, heads:] for part in words)
        return words[:count], words[count:]

    def decode_both(self, words: Words, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Keys and values that attention reads, of what `encode_both` gave."""
        if len(words) == len(self.components):
            decoded = self.decode(words, dtype)
            heads = decoded.shape[1] // 2
            return decoded[:, :heads], decoded[:, heads:]
        key_words, value_words = self.apart(words)
        return self.decode(key_words, dtype), self.decode(value_words, dtype)

    def read_back(self, keys: mx.array, values: mx.array) -> tuple[Words, mx.array, mx.array]:
        """What attention reads of them, where their words can wait: in as few operations as the device allows.

        Returns what was computed, for `encode_computed`, and the keys and values to read.
        """
        if keys.shape != values.shape:
            return (keys, values), *self.decode_both(self.encode_both(keys, values), keys.dtype)
        if kernel_reads_back(self, keys.dtype):
            return (keys, values), *cuda_codec.read_back(keys, values, bits=self.bits, group_size=self.group_size)
        both = side_by_side(keys, values)
        return (both,), *self.decode_both(self.encode(both), keys.dtype)

    def encode_computed(self, computed: Words) -> Words:
        """Components, as of `encode_both`, of what `read_back` says was computed, of one step or of several joined."""
        return self.encode(*computed) if len(computed) == 1 else self.encode_both(*computed)


def side_by_side(keys: mx.array, values: mx.array) -> mx.array:
    """Of one shape, along the axis of heads."""
    return mx.concatenate([keys, values], axis=1)


@cache
def kernel_reads_back(codec: Codec, dtype: mx.Dtype) -> bool:
    """Whether one kernel gives the bits of quantising and dequantising here. Compiles it: call it once at the start."""
    if not (codec.bits and cuda_codec.is_available()):
        return False
    size = mx.array([1e-3, 1.0, 1e3, 0.0]).reshape(4, 1, 1, 1)
    shape = 4, 64, 1, 2 * codec.group_size
    keys = (mx.random.normal(shape, key=mx.random.key(0)) * size).astype(dtype)
    values = (mx.random.normal(shape, loc=1.0, key=mx.random.key(1)) * size).astype(dtype)
    stock = codec.decode_both(codec.encode_both(keys, values), dtype)
    kernel = cuda_codec.read_back(keys, values, bits=codec.bits, group_size=codec.group_size)
    return all(bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8))) for a, b in zip(stock, kernel, strict=True))


def _decode_nibbles(packed: mx.array, scales: mx.array, biases: mx.array, group_size: int) -> mx.array:
    # The same arithmetic as mx.dequantize, bit for bit. On a CPU stock dequantisation is scalar code; these
    # elementwise operations are vectorised and take less than half the time.
    octets = packed.view(mx.uint8)
    nibbles = mx.stack([octets & 15, octets >> 4], axis=-1)
    grouped = nibbles.reshape(*scales.shape, group_size)
    return (grouped * scales[..., None] + biases[..., None]).reshape(*scales.shape[:-1], -1)


def _decode_by_product(packed: mx.array, scales: mx.array, biases: mx.array, codec: Codec) -> mx.array:
    # A product with the number one. What a decode step costs on a CPU is the count of its operations, and this is one
    # where the unpacking above is eight.
    one = mx.broadcast_to(_one(), (*packed.shape[:-2], 1, 1))
    return mx.quantized_matmul(
        one, packed, scales, biases, transpose=False, group_size=codec.group_size, bits=codec.bits
    )


@cache
def _one() -> mx.array:
    one = mx.ones((1, 1))
    mx.eval(one)
    return one


@cache
def _product_decodes(codec: Codec) -> bool:
    """Whether the product gives the bits of `mx.dequantize` here: not where it is compiled to fused multiply-adds."""
    size = mx.array([1e-3, 1.0, 1e3, 0.0]).reshape(4, 1, 1, 1)
    x = mx.random.normal((4, 64, 1, codec.group_size), key=mx.random.key(0)) * size
    packed, scales, biases = mx.quantize(x, group_size=codec.group_size, bits=codec.bits)
    product = _decode_by_product(packed, scales, biases, codec)
    stock = mx.dequantize(packed, scales, biases, group_size=codec.group_size, bits=codec.bits)
    return bool(mx.array_equal(product.view(mx.uint32), stock.view(mx.uint32)))


def storable(array: mx.array) -> mx.array:
    """The same bytes in a dtype that numpy has."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def restored(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Undoes `storable` for an array that had this dtype."""
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def join(pieces: Sequence[mx.array], axis: int) -> mx.array:
    """Concatenates, without a copy when there is one piece."""
    return pieces[0] if len(pieces) == 1 else mx.concatenate(list(pieces), axis=axis)
