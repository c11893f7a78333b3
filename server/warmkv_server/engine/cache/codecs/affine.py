"""Affine quantisation: values in groups along head_dim that share a scale and a bias."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from warmkv_server.engine.cache.codecs import cuda
from warmkv_server.engine.cache.codecs.codec import Coded, Component, Position, Words, side_by_side
from warmkv_server.errors import OperatorError


@dataclass(frozen=True)
class AffineCodec:
    """Words of 4 or 8 bits, with scales and biases of 16.

    Attributes:
        group_size: values along head_dim that share a scale and a bias.
    """

    bits: int = 4
    group_size: int = 64

    @property
    def identity(self) -> str:
        return f"affine-{self.bits}-{self.group_size}"

    def components(self, head_dim: int, dtype: mx.Dtype) -> tuple[Component, ...]:
        if head_dim % self.group_size:
            fitting = next((size for size in (64, 32) if head_dim % size == 0), None)
            remedy = f"--kv-group-size {fitting}" if fitting else "--kv-bits 0 to keep the KV unquantised"
            raise OperatorError(
                f"keys or values of dimension {head_dim}, which doesn't divide by the group size {self.group_size}; "
                f"start with {remedy}"
            )
        groups = head_dim // self.group_size
        scale = mx.float16 if dtype == mx.float32 else dtype
        return (
            Component("words", head_dim * self.bits // 32, mx.uint32),
            Component("scales", groups, scale),
            Component("biases", groups, scale),
        )

    def encode(self, x: mx.array, _: Position = 0) -> Words:
        words, scales, biases = mx.quantize(x, group_size=self.group_size, bits=self.bits)
        if scales.dtype == mx.float32:
            # Rounded before first use, so that 16 bits are all there is to store: 4.5 bits a value instead of 5.
            scales, biases = scales.astype(mx.float16), biases.astype(mx.float16)
        return words, scales, biases

    def decode(self, words: Words, dtype: mx.Dtype, _: Position = 0) -> mx.array:
        packed, scales, biases = words
        scales, biases = scales.astype(dtype), biases.astype(dtype)
        if dtype == mx.float32 and packed.shape[-2] == 1 and _product_decodes(self):
            return _decode_by_product(packed, scales, biases, self)
        if self.bits == 4 and dtype == mx.float32:
            return _decode_nibbles(packed, scales, biases, self.group_size)
        return mx.dequantize(packed, scales, biases, group_size=self.group_size, bits=self.bits)

    def step(self, x: mx.array, _: Position = 0) -> tuple[Words, mx.array]:
        # Putting what was computed together is one operation, and putting words together three.
        return (x,), self.decode(self.encode(x), x.dtype)

    def words_of(self, stepped: Words, _: Position = 0) -> Words:
        return self.encode(*stepped)

    def beside(self, other: object) -> AffineCodec | None:
        return self if self == other else None

    def read_back(self, keys: mx.array, values: mx.array, _: Position = 0) -> tuple[Coded, mx.array, mx.array]:
        if kernel_reads_back(self, keys.dtype):
            return ((keys,), (values,)), *cuda.read_back(keys, values, bits=self.bits, group_size=self.group_size)
        both = side_by_side(keys, values)
        read = self.decode(self.encode(both), keys.dtype)
        heads = keys.shape[1]
        return ((both,),), read[:, :heads], read[:, heads:]


@cache
def kernel_reads_back(codec: AffineCodec, dtype: mx.Dtype) -> bool:
    """Whether one kernel gives the bits of quantising and dequantising here. Compiles it: call it once at the start."""
    if not cuda.is_available():
        return False
    size = mx.array([1e-3, 1.0, 1e3, 0.0]).reshape(4, 1, 1, 1)
    shape = 4, 64, 1, 2 * codec.group_size
    keys = (mx.random.normal(shape, key=mx.random.key(0)) * size).astype(dtype)
    values = (mx.random.normal(shape, loc=1.0, key=mx.random.key(1)) * size).astype(dtype)
    stock = [codec.decode(codec.encode(x), dtype) for x in (keys, values)]
    kernel = cuda.read_back(keys, values, bits=codec.bits, group_size=codec.group_size)
    return all(bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8))) for a, b in zip(stock, kernel, strict=True))


def _decode_nibbles(packed: mx.array, scales: mx.array, biases: mx.array, group_size: int) -> mx.array:
    # The same arithmetic as mx.dequantize, bit for bit. On a CPU stock dequantisation is scalar code; these
    # elementwise operations are vectorised and take less than half the time.
    octets = packed.view(mx.uint8)
    nibbles = mx.stack([octets & 15, octets >> 4], axis=-1)
    grouped = nibbles.reshape(*scales.shape, group_size)
    return (grouped * scales[..., None] + biases[..., None]).reshape(*scales.shape[:-1], -1)


def _decode_by_product(packed: mx.array, scales: mx.array, biases: mx.array, codec: AffineCodec) -> mx.array:
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
def _product_decodes(codec: AffineCodec) -> bool:
    """Whether the product gives the bits of `mx.dequantize` here: not where it is compiled to fused multiply-adds."""
    size = mx.array([1e-3, 1.0, 1e3, 0.0]).reshape(4, 1, 1, 1)
    x = mx.random.normal((4, 64, 1, codec.group_size), key=mx.random.key(0)) * size
    packed, scales, biases = mx.quantize(x, group_size=codec.group_size, bits=codec.bits)
    product = _decode_by_product(packed, scales, biases, codec)
    stock = mx.dequantize(packed, scales, biases, group_size=codec.group_size, bits=codec.bits)
    return bool(mx.array_equal(product.view(mx.uint32), stock.view(mx.uint32)))
