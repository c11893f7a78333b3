"""mlx-lm's caches, made to quantise first and to remember what they stored.

A model calls `update_and_fetch(keys, values)` and attends to what comes back. Each class here is the stock cache with
one thing put before it: the new keys and values are quantised, what was quantised is kept in `log` until the engine
drains it, and the stock cache goes on with the dequantised values. Model code sees a stock cache of the class it asked
for.

Recurrent caches (`ArraysCache`) hold state that is not quantised and can't be cut; they are used as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from warmkv_server.contract.kv import PartKind
from warmkv_server.engine.cache.attention_shapes import FewShapes, make_room
from warmkv_server.engine.cache.codec import Codec, Words, join
from warmkv_server.errors import OperatorError

DRAIN_EVERY = 64
"""Steps of decoding after which the words of what was logged are made, so that the log doesn't grow with the answer."""


class StockCache(Protocol):
    """The part of mlx-lm's cache protocol that the mixin stands before."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


class QuantiseFirst:
    """Mixin over a stock cache, before it in the order of resolution."""

    kind: PartKind
    codec: Codec
    log: list[tuple[mx.array, ...]]
    """Of each update: its words, as `Codec.encode_both` gives them.

    Of an update of one token, what `Codec.read_back` says was computed: `take` makes the words of many of them at once,
    because what a step of decoding costs is the count of its operations.
    """

    def record_with(self, codec: Codec) -> None:
        self.codec = codec
        self.log = []

    @classmethod
    def of(cls, rows: Sequence[QuantiseFirst]) -> Self:
        """The batch of these sequences' caches, for a class that stands before one of mlx-lm's batch caches."""
        stock: Any = cls
        batch: Self = stock.merge(rows)
        batch.record_with(rows[0].codec)
        return batch

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = self.quantised(keys, values, keys.shape[-2])
        stock: StockCache = super()  # type: ignore[assignment]
        fetched = stock.update_and_fetch(keys, values)
        if _starts_early(rows=keys.shape[0], tokens=keys.shape[-2]):
            mx.async_eval(fetched)
        return fetched

    def quantised(self, keys: mx.array, values: mx.array, kept: int) -> tuple[mx.array, mx.array]:
        """What attention reads of them. The first `kept` tokens are logged."""
        if kept == 1 and self.codec.bits:
            computed, keys, values = self.codec.read_back(keys, values)
        else:
            computed = self.codec.encode_both(keys, values)
            keys, values = self.codec.decode_both(computed, keys.dtype)
        if kept < keys.shape[-2]:
            computed = tuple(part[..., :kept, :] for part in computed)
        self.log.append(computed)
        return keys, values

    def cut(self, tokens: int) -> None:
        """Forget the last tokens of the last update, which had more of them. For caches that keep every token."""
        stock: Any = super()
        trimmed = stock.trim(tokens)
        assert trimmed == tokens
        self.log[-1] = tuple(component[..., :-tokens, :] for component in self.log[-1])

    def take(self) -> tuple[Words, Words]:
        """What was stored since the last time: keys' and values' components, each (rows, kv_heads, tokens, width)."""
        runs: list[tuple[mx.array, ...]] = []
        for computed, run in itertools.groupby(self.log, key=self._is_computed):
            joined = tuple(join(column, -2) for column in zip(*run, strict=True))
            runs.append(self.codec.encode_computed(joined) if computed else joined)
        self.log = []
        return self.codec.apart(tuple(join(column, -2) for column in zip(*runs, strict=True)))

    def _is_computed(self, update: tuple[mx.array, ...]) -> bool:
        """Whether this update was logged as it was computed, and not as words."""
        return bool(self.codec.bits) and mx.issubdtype(update[0].dtype, mx.floating)


class AppendCache(QuantiseFirst, KVCache):
    """Full attention: every token is kept.

    Args:
        shapes: those that attention is to be given; None where any will do.
    """

    kind = PartKind.APPEND

    def __init__(self, codec: Codec, shapes: FewShapes | None = None) -> None:
        stock: Any = super()
        stock.__init__()
        self.record_with(codec)
        self.shapes = shapes

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> Any:  # noqa: N803 - mlx-lm's name
        if N > 1 and self.shapes is not None and (mask := self.shapes.mask(self.offset, N)) is not None:
            return mask
        stock: Any = super()
        return stock.make_mask(N, return_array=return_array, **kwargs)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.shapes is None:
            return super().update_and_fetch(keys, values)
        tokens = keys.shape[-2]
        length = self.shapes.length(self.offset + tokens)
        make_room(self, self.offset, length, keys, values)
        read = super().update_and_fetch(keys, values)
        if tokens == 1:
            return read
        stock: Any = self
        return stock.keys[..., :length, :], stock.values[..., :length, :]

    @classmethod
    def merge(cls, caches: Sequence[AppendCache]) -> BatchAppendCache:
        return BatchAppendCache.of(caches)

    def fill(self, keys: mx.array, values: mx.array, length: int) -> None:
        """Start from `length` tokens already there; keys and values may have room for more behind them."""
        self.keys, self.values, self.offset = keys, values, length


class BatchAppendCache(QuantiseFirst, BatchKVCache):
    """Rows of full attention.

    Attributes:
        even: whether all rows have the same length, so that none is padded on its left.
        shapes: those that attention is to be given; None where any will do.
    """

    kind = PartKind.APPEND
    even = False
    shapes: FewShapes | None = None

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Self:
        if any(row.offset for row in rows):
            batch = super().of(rows)
        else:  # of empty ones mlx-lm makes a batch of its own class
            batch = cls([0] * len(rows))
            batch.record_with(rows[0].codec)
        batch.shapes = rows[0].shapes
        return batch

    @property
    def wants_two(self) -> bool:
        """Whether a step is to feed two tokens a row, the second of which is padding and forgotten at once."""
        return self.shapes is not None and not self.even and self._idx >= self.shapes.long

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.shapes is None or self._idx < self.shapes.long:
            return super().update_and_fetch(keys, values)
        start, tokens = self._idx, keys.shape[-2]
        length = self.shapes.length(start + tokens)
        make_room(self, start, length, keys, values)
        if tokens != 2 or not self.wants_two:
            return super().update_and_fetch(keys, values)
        keys, values = self.quantised(keys, values, kept=1)
        stock: Any = self
        stock.keys[..., start : start + tokens, :] = keys
        stock.values[..., start : start + tokens, :] = values
        self._idx += 1
        self.offset = self.offset + 1
        return stock.keys[..., :length, :], stock.values[..., :length, :]

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> Any:  # noqa: N803 - mlx-lm's name
        if N == 2 and self.shapes is not None and self.wants_two:
            return self.shapes.row_mask(self._idx, N, self.left_padding)
        if self.even and not return_array and kwargs.get("window_size") is None:
            return None if N == 1 else "causal"  # fused kernels want no array
        stock: Any = super()
        return stock.make_mask(N, return_array=return_array, **kwargs)


class WindowCache(QuantiseFirst, RotatingKVCache):
    """Sliding-window attention: the last `max_size` tokens are kept."""

    kind = PartKind.WINDOW

    def __init__(self, codec: Codec, window: int) -> None:
        stock: Any = super()
        stock.__init__(window)
        self.record_with(codec)

    @property
    def window(self) -> int:
        return int(self.max_size)

    @classmethod
    def merge(cls, caches: Sequence[WindowCache]) -> BatchWindowCache:
        return BatchWindowCache.of(caches)

    def fill(self, keys: mx.array, values: mx.array, length: int) -> None:
        """Start after `length` tokens from the last of them, in temporal order."""
        keep = min(length, self.max_size)
        self.keys, self.values = keys[..., -keep:, :], values[..., -keep:, :]
        self.offset, self._idx = length, keep


class BatchWindowCache(QuantiseFirst, BatchRotatingKVCache):
    kind = PartKind.WINDOW


class ChunkCache(QuantiseFirst, ChunkedKVCache):
    """Chunked attention: at least the tokens of the current chunk are kept."""

    kind = PartKind.WINDOW

    def __init__(self, codec: Codec, window: int) -> None:
        stock: Any = super()
        stock.__init__(window)
        self.record_with(codec)

    @property
    def window(self) -> int:
        return int(self.chunk_size)

    def fill(self, keys: mx.array, values: mx.array, length: int) -> None:
        """Start after `length` tokens from the last of them."""
        keep = min(length, self.chunk_size)
        self.keys, self.values = keys[..., -keep:, :], values[..., -keep:, :]
        self.offset, self.start_position = length, length - keep


def quantise_first(cache: Any, codec: Codec, shapes: FewShapes | None = None) -> Any:
    """The counterpart of one empty cache that a model's `make_cache` gave.

    Args:
        shapes: for caches of full attention, those that attention is to be given.

    Raises:
        OperatorError: for a kind of cache whose content can't be kept.
    """
    kept: Any
    if type(cache) is KVCache:
        kept = AppendCache(codec, shapes)
    elif type(cache) is RotatingKVCache and cache.keep == 0:
        kept = WindowCache(codec, cache.max_size)
    elif type(cache) is ChunkedKVCache:
        kept = ChunkCache(codec, cache.chunk_size)
    elif type(cache) is CacheList:
        return CacheList(*(quantise_first(member, codec) for member in cache.caches))
    elif type(cache) is ArraysCache:
        return cache
    else:
        raise OperatorError(
            f"the model keeps its context in a {type(cache).__name__}, which WarmKV can't store and restore; "
            "use a model with another kind of attention"
        )
    return kept


def _starts_early(rows: int, tokens: int) -> bool:
    """Whether each layer is computed while Python describes the next one.

    MLX hands few operations to a CPU beyond the one that it works on, so that it would stand still while a step of one
    token is described, for a third of the time. Larger products want all cores, and Python's would be missing there; a
    GPU is kept busy anyway.
    """
    return rows == tokens == 1 and bool(mx.default_device() == mx.cpu)


def leaves(caches: Sequence[Any]) -> Iterator[Any]:
    """The caches that hold something, composite ones taken apart, in the model's order."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def can_batch(caches: Sequence[Any]) -> bool:
    """Whether sequences with these caches can share one decode step."""
    return all(hasattr(leaf, "merge") for leaf in leaves(caches))


def arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Every array the caches and their logs hold: what to evaluate so that nothing lazy is left behind."""
    found: list[Any] = []
    for leaf in leaves(caches):
        if isinstance(leaf, ArraysCache):
            found.extend(array for array in leaf.cache if array is not None)
        else:
            found += [a for a in (leaf.keys, leaf.values) if a is not None]
            found += [a for words in leaf.log for a in words]
    return found
