"""Few shapes of attention, for a device whose fused kernels are planned for each.

MLX has cuDNN plan attention anew, for 40 to 70 ms, for every new pair of chunk length and context length. Where chunks
are padded behind their end, and read keys and values up to a round length under a mask, few pairs are left. What is
masked has no weight at all, so the values are the same but for the rounding of another order.

Nothing here looks at where a context came from: lengths are functions of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

_ODD = 8
"""Tokens that keep a capacity from being a multiple of 256, and rows aligned."""


@dataclass(frozen=True)
class AttentionShapes:
    """The lengths that attention is given.

    Attributes:
        dtype: of queries, and so of masks: one of truth values would be turned into numbers in every layer.
        step: contexts are read, and have memory, up to a multiple of this many tokens.
        fine: chunks longer than this are padded to a multiple of it, shorter ones to a power of two.
        smallest: chunks are padded at least to this.
        long: from so many tokens on, a step costs what reading them takes, and not the host's part of it. Then the
            kernel for one token is to be cuDNN's, and padded rows are computed by the one for several tokens, the
            second of which is padding: there is none for one token under a mask.
    """

    dtype: mx.Dtype
    step: int = 1024
    fine: int = 256
    smallest: int = 32
    long: int = 8192

    def tokens(self, count: int) -> int:
        """Of a chunk with so many tokens, when it is padded."""
        if count > self.fine:
            return -(-count // self.fine) * self.fine
        return max(self.smallest, 1 << (count - 1).bit_length())

    def length(self, end: int) -> int:
        """How far a context of so many tokens is read."""
        return -(-end // self.step) * self.step

    def capacity(self, length: int) -> int:
        """Tokens for which caches that are read so far have room.

        MLX lets cuDNN compute one token where this is a multiple of 256, and a kernel of its own elsewhere, which
        needs no plan and less of the host.
        """
        return length if length > self.long else length + _ODD

    def room(self, end: int) -> int:
        """The most tokens that caches have room for once a context of so many tokens is computed."""
        return self.length(end + max(self.fine, self.smallest)) + _ODD

    def chunk(self, start: int, end: int) -> tuple[int, int]:
        """The pair that attention is planned for, of a chunk that is padded: its tokens, and how far it reads."""
        tokens = self.tokens(end - start)
        return tokens, self.length(start + tokens)

    def decoding(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Of a step of rows that hold so many tokens: the tokens that each is fed, and how far it reads.

        Where rows differ in length they need a mask, and long ones are fed two, the second of which is padding and
        forgotten at once.
        """
        longest = max(lengths)
        if longest < self.long or min(lengths) == longest:
            return 1, longest + 1
        return 2, self.length(longest + 2)

    def mask(self, start: int, tokens: int) -> mx.array | None:
        """What a chunk's tokens must not see, (tokens, length); None where the causal mask says it all."""
        length = self.length(start + tokens)
        if length == start + tokens:
            return None
        return self._numbers(mx.arange(start, start + tokens)[:, None] >= mx.arange(length))

    def row_mask(self, start: int, tokens: int, left_padding: mx.array) -> mx.array:
        """The same for rows that are padded on their left, (rows, 1, tokens, length)."""
        at = mx.arange(self.length(start + tokens))
        seen = mx.arange(start, start + tokens)[:, None] >= at
        return self._numbers(seen & (left_padding[:, None, None, None] <= at))

    def _numbers(self, seen: mx.array) -> mx.array:
        return mx.where(seen, mx.array(0, self.dtype), mx.array(-mx.inf, self.dtype))


def make_room(cache: Any, held: int, length: int, keys: mx.array, values: mx.array) -> None:
    """Give a cache that holds so many tokens room for being read up to `length`, which is one of its shapes.

    Args:
        keys, values: of the shape, but for their length, and the type of what the cache holds.
    """
    shapes: AttentionShapes = cache.shapes
    there = 0 if cache.keys is None else cache.keys.shape[-2]
    if there < length or there != shapes.capacity(there // shapes.step * shapes.step):
        behind = shapes.capacity(length) - held
        cache.keys = _longer(cache.keys, held, behind, keys)
        cache.values = _longer(cache.values, held, behind, values)


def _longer(held: mx.array | None, tokens: int, more: int, like: mx.array) -> mx.array:
    behind = mx.zeros((*like.shape[:-2], more, like.shape[-1]), like.dtype)
    return behind if held is None else mx.concatenate([held[..., :tokens, :], behind], axis=-2)
