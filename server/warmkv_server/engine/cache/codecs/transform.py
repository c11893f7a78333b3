"""Quantisation after a change of basis: of what is left of a value when the mean is taken away.

A token's vector is turned back to where it was before its position rotated it, its mean is taken away, and the rest is
multiplied by a matrix after which all values are about equally large, and an error of each costs about the same. Then
it is quantised in groups. The matrices and means are constants of the model: see `engine/model/constants.py`.

A head's values come in the order of how much they vary, and those that vary more have longer words: so all have the
same step, and one scale does for a group. The mean being gone, numbers are as often below zero as above it, and nothing
is kept to say where they begin.

What is read must not depend on how many tokens are read at once, and products do: BLAS sums in another order for one
row than for many. So what is multiplied are small numbers, whole ones and a half, and the matrix that they are
multiplied by when they are read has whole numbers, but for a power of two for each column: then every partial sum is
exact in 32 bits, and the order of summing doesn't matter. Nor does the device, or whether it rounds factors to eleven
bits. All else is done value by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from warmkv_server.engine.cache.codecs import packing
from warmkv_server.engine.cache.codecs.codec import Coded, Component, Position, Words, side_by_side
from warmkv_server.engine.cache.codecs.rotation import Rotation, positions_of
from warmkv_server.errors import OperatorError

Floats = NDArray[np.float64]

WHOLE = 511
"""Largest whole number in the matrix that numbers are multiplied by. With words of 8 bits and groups of 128 the largest
sum is below 2 to the 24th halves: what 32-bit numbers count to without a gap."""

_RANGES = (1.0, 0.94, 0.88)
"""Of the range of a group, the parts that are tried for words of some 4 bits or fewer: what lies outside is rounded
farther, and all else less far."""

_SMALLEST = 2.0**-14
"""Scale, of values whose variance is about one: below, 16 bits have fewer digits."""


@dataclass(frozen=True)
class Basis:
    """Constants of one stream, for heads that each have their own.

    Attributes:
        bits: of the word of each value that is quantised, (heads, head_dim); of every head as many in all.
        back: whole numbers times powers of two, (heads, head_dim, head_dim): from what is quantised to values.
        mean: (heads, head_dim), of values that aren't rotated.
        first: the same of what stands at position 0, which is unlike all others: attention that looks for nothing looks
            there.
    """

    bits: Floats
    back: Floats
    mean: Floats
    first: Floats

    @classmethod
    def of(cls, bits: Floats, back: Floats, mean: Floats, first: Floats) -> Basis:
        """Of any matrix that can be inverted; the nearest one of the form that it has to have.

        Args:
            bits: of all heads, (head_dim,).
        """
        return cls(np.tile(bits, (len(back), 1)), whole(back), _single(mean), _single(first))


def _single(values: Floats) -> Floats:
    """What 32 bits keep of them, without negative zeros."""
    kept: Floats = values.astype(np.float32).astype(np.float64) + 0.0
    return kept


def whole(matrix: Floats) -> Floats:
    """The nearest matrix of whole numbers, times a power of two for each column."""
    largest = np.abs(matrix).max(axis=-2, keepdims=True)
    power = 2.0 ** np.ceil(np.log2(np.maximum(largest, 1e-30) / WHOLE))
    rounded: Floats = np.round(matrix / power) * power + 0.0
    return rounded


@dataclass(frozen=True, eq=False)
class TransformCodec:
    """Words of about `bits`, with a scale of 16 for each group.

    Attributes:
        name: of the kind of transform.
        bits: as they are asked for.
        group_size: values that share a scale; divides the width of a head.
        basis: of each head.
        digest: of the constants of all streams of the model.
        rotation: of the keys by position; None where there is none.
        still: of the heads, so many in the end are not rotated.
    """

    name: str
    bits: int
    group_size: int
    basis: Basis
    digest: str
    rotation: Rotation | None = None
    still: int = 0

    @property
    def identity(self) -> str:
        return f"{self.name}-{self.bits}-{self.group_size}-{self.digest}"

    def components(self, head_dim: int, _dtype: mx.Dtype) -> tuple[Component, ...]:
        if head_dim != self.basis.back.shape[-1]:
            raise OperatorError(f"keys or values of dimension {head_dim}, for which the constants were not made")
        groups = head_dim // self.group_size
        return (
            Component("words", round(self.basis.bits[0].sum()) // 8, mx.uint8),
            Component("scales", groups, mx.float16),
        )

    def encode(self, x: mx.array, start: Position = 0) -> Words:
        ranges = _RANGES if self.bits <= 4 else _RANGES[:1]
        return self._packed(*_fitted(self._grouped(self._into(x, start)), self._grouped(self._arrays.half), ranges))

    def decode(self, words: Words, dtype: mx.Dtype, start: Position = 0) -> mx.array:
        packed, scales = words
        numbers = packing.unpacked(packed, self._widths) + (0.5 - self._arrays.half)
        if len(self._arrays.back) == 1:
            return self._back(numbers, scales.astype(mx.float32), start).astype(dtype)
        return self._back(self._grouped(numbers), scales.astype(mx.float32)[..., None], start).astype(dtype)

    def step(self, x: mx.array, start: Position) -> tuple[Words, mx.array]:
        y = self._into(x, start)
        if len(self._arrays.back) == 1:
            numbers, scales = _quick(y, self._arrays.half)
            return (numbers, scales), self._back(numbers, scales, start).astype(x.dtype)
        numbers, scales = _quick(self._grouped(y), self._grouped(self._arrays.half))
        read = self._back(numbers, scales, start).astype(x.dtype)
        return (numbers.flatten(-2), scales[..., 0]), read

    def words_of(self, stepped: Words, _: Position) -> Words:
        return self._packed(self._grouped(stepped[0]), stepped[1][..., None])

    def beside(self, other: object) -> TransformCodec | None:
        alike = (
            isinstance(other, TransformCodec)
            and (self.bits, self.group_size) == (other.bits, other.group_size)
            and self.basis.back.shape == other.basis.back.shape
            and self.basis.bits[0].sum() == other.basis.bits[0].sum()
            and other.rotation is None
        )
        if not alike:
            return None
        assert isinstance(other, TransformCodec)
        pairs = zip(vars(self.basis).values(), vars(other.basis).values(), strict=True)
        basis = Basis(*(np.concatenate(pair) for pair in pairs))
        return TransformCodec(
            self.name, self.bits, self.group_size, basis, self.digest, self.rotation, other.basis.back.shape[0]
        )

    def read_back(self, keys: mx.array, values: mx.array, start: Position) -> tuple[Coded, mx.array, mx.array]:
        stepped, read = self.step(side_by_side(keys, values), start)
        heads = keys.shape[1]
        return (stepped,), read[:, :heads], read[:, heads:]

    def _packed(self, numbers: mx.array, scales: mx.array) -> Words:
        words = numbers.flatten(-2) + (self._arrays.half - 0.5)
        return packing.packed(words.astype(mx.uint8), self._widths), scales[..., 0].astype(mx.float16)

    @cached_property
    def _widths(self) -> packing.Widths:
        return packing.widths(self.basis.bits)

    def _grouped(self, y: mx.array) -> mx.array:
        """(rows, heads, tokens, groups, group size)"""
        return y.reshape(*y.shape[:-1], -1, self.group_size)

    def _into(self, x: mx.array, start: Position) -> mx.array:
        """In the other basis, (rows, heads, tokens, head_dim)."""
        arrays, tokens = self._arrays, x.shape[-2]
        # The mean goes first: it may be many times what is left, and GPUs round factors to eleven bits.
        x = x.astype(mx.float32) - self._turned(_at(start, tokens, arrays.mean, arrays.first), start, tokens)
        if self.rotation is not None:
            x = (x[..., None, :] * self._turn(start, tokens)).flatten(-2)
        return x @ arrays.into

    def _back(self, numbers: mx.array, scales: mx.array, start: Position) -> mx.array:
        """Values of whole numbers, (rows, heads, tokens, groups, group size), that have these scales.

        Of one group, without the axis of groups.
        """
        arrays = self._arrays
        tokens = numbers.shape[2]
        found = _at(start, tokens, arrays.mean, arrays.first)
        if len(arrays.back) == 1:
            found = (numbers @ arrays.back[0]) * scales + found
        else:
            # One group after the other, so that what is added is added in one order.
            for group, back in enumerate(arrays.back):
                found = (numbers[..., group, :] @ back) * scales[..., group, :] + found
        return self._turned(found, start, tokens)

    def _turned(self, still: mx.array, start: Position, tokens: int) -> mx.array:
        """Rotated to where they stand, (..., tokens or 1, head_dim or twice that)."""
        if self.rotation is None:
            return still
        turned = still * self._turn(start, tokens, flat=True)
        half = turned.shape[-1] // 2
        return turned[..., :half] + turned[..., half:]

    def _turn(self, start: Position, tokens: int, *, flat: bool = False) -> mx.array:
        assert self.rotation is not None
        return self.rotation.at(start, tokens, self.basis.back.shape[0] - self.still, self.still, flat=flat)

    @cached_property
    def _arrays(self) -> _Arrays:
        return _Arrays.of(self)


@dataclass(frozen=True)
class _Arrays:
    """What is multiplied and added, rotated keys' with both halves of a rotation.

    Attributes:
        half: of the numbers that each word can be, (heads, 1, head_dim).
        into: (heads, head_dim or twice that, head_dim).
        back: of each group, (heads, group size, head_dim or twice that).
        mean, first: (heads, 1, head_dim or twice that).
    """

    half: mx.array
    into: mx.array
    back: tuple[mx.array, ...]
    mean: mx.array
    first: mx.array

    @classmethod
    def of(cls, codec: TransformCodec) -> _Arrays:
        basis, rotation = codec.basis, codec.rotation
        back = basis.back.astype(np.float64)
        into = np.linalg.inv(back)
        mean, first = basis.mean[:, None].astype(np.float64), basis.first[:, None].astype(np.float64)
        if rotation is not None:
            partner, still = rotation.partner, codec.still
            turns = np.ones((len(back), 1, 1))
            if still:
                turns[-still:] = 0
            gain = np.where(turns == 0, 1.0, rotation.gain[:, None])
            # Turned back, a vector is the sum of two, each times half of these rows.
            into = np.concatenate([into / gain, turns * (into / gain)[:, partner]], axis=1)
            back = np.concatenate([back, turns * back[..., partner]], axis=-1)
            mean, first = (np.concatenate([each, turns * each[..., partner]], axis=-1) for each in (mean, first))
        groups = back.reshape(len(back), -1, codec.group_size, back.shape[-1])

        def array(values: Any) -> mx.array:
            return mx.array(np.ascontiguousarray(values + 0.0, dtype=np.float32))

        made = cls(
            array(2.0 ** (basis.bits[:, None] - 1)),
            array(into),
            tuple(array(groups[:, group]) for group in range(groups.shape[1])),
            array(mean),
            array(first),
        )
        mx.eval(list(vars(made).values()))
        return made


def _at(start: Position, tokens: int, mean: mx.array, first: mx.array) -> mx.array:
    """What is the same for all tokens but the first of a context, (heads, tokens or 1, width) or rows of it."""
    if isinstance(start, mx.array) or (isinstance(start, tuple) and 0 in start):
        return mx.where((positions_of(start, tokens) == 0)[:, None, :, None], first, mean)
    if isinstance(start, tuple) or start:
        return mean
    if tokens == 1:
        return first
    heads, _, width = mean.shape
    return mx.concatenate([first, mx.broadcast_to(mean, (heads, tokens - 1, width))], axis=-2)


def _quick(y: mx.array, half: mx.array) -> tuple[mx.array, mx.array]:
    """Numbers, whole ones and a half, and scales: a value is number x scale. In few operations: what a step of decoding
    costs is their count."""
    # A little more than the range needs: no more numbers come out than there are, also after the scale is rounded.
    scales = _stored(_largest(y, half) * (1 + 2**-9))
    return mx.floor(y / scales) + 0.5, scales


def _fitted(y: mx.array, half: mx.array, ranges: Sequence[float]) -> tuple[mx.array, mx.array]:
    """The same with less error: of some ranges the best, with the scale of least squares."""
    largest = _largest(y, half)
    best: tuple[mx.array, ...] = ()
    for part in ranges:
        numbers = mx.clip(mx.floor(y / (largest * part)), -half, half - 1) + 0.5
        along = (y * numbers).sum(axis=-1, keepdims=True)
        squares = mx.square(numbers).sum(axis=-1, keepdims=True)
        # What the scale of least squares leaves of the error is less by this.
        found = mx.square(along) / squares, numbers, along / squares
        if not best:
            best = found
        else:
            better = found[0] > best[0]
            best = tuple(mx.where(better, *pair) for pair in zip(found, best, strict=True))
    _, numbers, scales = best
    return numbers, _stored(mx.maximum(scales, _SMALLEST))


def _largest(y: mx.array, half: mx.array) -> mx.array:
    """The scale with which every value of a group has a number."""
    return mx.maximum((mx.abs(y) / half).max(axis=-1, keepdims=True), _SMALLEST)


def _stored(scales: mx.array) -> mx.array:
    """As they will be read."""
    return scales.astype(mx.float16).astype(mx.float32)
