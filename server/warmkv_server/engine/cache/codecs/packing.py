"""Whole numbers of a few bits in bytes: in pieces of 8, 4, 2 and 1 bits, which few operations take apart.

Four bits are as MLX packs them. Numbers of other widths MLX packs across the borders of bytes, and taking them apart
takes 64-bit operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

EIGHT = 8
"""Of one width must as many be, or a multiple: they fill whole bytes, however wide they are."""


class Stretch(NamedTuple):
    """Numbers of one width, behind each other."""

    width: int
    values: int


Widths = tuple[tuple[int, tuple[Stretch, ...]], ...]
"""Of heads, so many with these stretches, behind each other."""


def widths(bits: NDArray[Any]) -> Widths:
    """Of numbers of these widths, (heads, values)."""
    heads = [tuple(Stretch(int(width), len(list(same))) for width, same in groupby(head)) for head in bits]
    return tuple((len(list(same)), stretches) for stretches, same in groupby(heads))


def packed(numbers: mx.array, own: Widths) -> mx.array:
    """Numbers of type uint8, (rows, heads, tokens, values), in bytes."""
    heads = mx.split(numbers, _borders(count for count, _ in own), axis=1)
    return _joined([_packed(head, stretches) for head, (_, stretches) in zip(heads, own, strict=True)], 1)


def unpacked(octets: mx.array, own: Widths) -> mx.array:
    """The numbers, of type uint8."""
    heads = mx.split(octets, _borders(count for count, _ in own), axis=1)
    return _joined([_unpacked(head, stretches) for head, (_, stretches) in zip(heads, own, strict=True)], 1)


def _packed(numbers: mx.array, stretches: tuple[Stretch, ...]) -> mx.array:
    octets = []
    parts = mx.split(numbers, _borders(stretch.values for stretch in stretches), axis=-1)
    for stretch, those in zip(stretches, parts, strict=True):
        for size, shift in _pieces(stretch.width):
            piece = (those >> shift) & ((1 << size) - 1) if size < EIGHT else those
            octet = piece[..., :: EIGHT // size]
            for place in range(1, EIGHT // size):
                octet = octet | (piece[..., place :: EIGHT // size] << (place * size))
            octets.append(octet)
    return _joined(octets, -1)


def _unpacked(octets: mx.array, stretches: tuple[Stretch, ...]) -> mx.array:
    found = []
    sizes = [stretch.values * size // EIGHT for stretch in stretches for size, _ in _pieces(stretch.width)]
    pieces = iter(mx.split(octets, _borders(sizes), axis=-1))
    for stretch in stretches:
        numbers = None
        for size, shift in _pieces(stretch.width):
            octet = next(pieces)
            if size < EIGHT:
                places = [(octet >> (place * size)) & ((1 << size) - 1) for place in range(EIGHT // size)]
                octet = mx.stack(places, axis=-1).flatten(-2) << shift
            numbers = octet if numbers is None else numbers | octet
        assert numbers is not None
        found.append(numbers)
    return _joined(found, -1)


def _pieces(width: int) -> Iterator[tuple[int, int]]:
    """Their sizes, and where in a number they lie."""
    shift = 0
    for size in (8, 4, 2, 1):
        if width & size:
            yield size, shift
            shift += size


def _borders(counts: Any) -> list[int]:
    borders: list[int] = np.cumsum(list(counts))[:-1].tolist()
    return borders


def _joined(arrays: list[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=axis)
