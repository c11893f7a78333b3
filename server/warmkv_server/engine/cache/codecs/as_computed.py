"""Values as they are computed, for KV that is not to be quantised."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from warmkv_server.engine.cache.codecs.codec import Component, Position, Words


@dataclass(frozen=True)
class AsComputed:
    """Stores what attention reads."""

    bits = 0
    group_size = 0
    identity = ""

    def components(self, head_dim: int, dtype: mx.Dtype) -> tuple[Component, ...]:
        return (Component("values", head_dim, dtype),)

    def encode(self, x: mx.array, _: Position = 0) -> Words:
        return (x,)

    def decode(self, words: Words, _dtype: mx.Dtype, _: Position = 0) -> mx.array:
        return words[0]

    def step(self, x: mx.array, _: Position) -> tuple[Words, mx.array]:
        return (x,), x

    def words_of(self, stepped: Words, _: Position) -> Words:
        return stepped
