"""mlx-lm's caches, made to quantise first and to remember what they stored.

A model calls `update_and_fetch(keys, values)` and attends to what comes back. Each class here is the stock cache with
one thing put before it: the new keys and values are quantised, what was quantised is kept in `log` until the engine
drains it, and the stock cache goes on with the dequantised values. Model code sees a stock cache of the class it asked
for.

Recurrent caches (`ArraysCache`) hold state that is not quantised and can't be cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Self, cast

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from warmkv_server.contract.kv import PartKind
from warmkv_server.engine.cache.attention_shapes import AttentionShapes, make_room
from warmkv_server.engine.cache.codecs.codec import CodecPlan, Coded, LayerCodec, Words, apart, cut_tokens, join_tokens
from warmkv_server.engine.cache.layer_cache import Kept, LayerCache, TokenCache, Update
from warmkv_server.errors import OperatorError

DRAIN_EVERY = 64
"""Steps of decoding after which the words of what was logged are made, so that the log doesn't grow with the answer."""


class QuantiseFirst(Kept):
    """Mixin over a stock cache, before it in the order of resolution."""

    kind: ClassVar[PartKind]
    batch: ClassVar[type[QuantiseFirst] | None] = None
    """Of the rows of a batch; None where they can't be put together."""
    window = 0
    even = False
    codec: LayerCodec
    log: list[Update]
    starts: tuple[int, ...] | None = None
    """Of a batch: the positions of the rows' next tokens, where whoever feeds them knows: `offset` is on the device."""

    @property
    def batches(self) -> bool:
        return self.batch is not None

    def record_with(self, codec: LayerCodec) -> None:
        self.codec = codec
        self.log = []

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """The batch of these sequences' caches."""
        assert cls.batch is not None
        return cls.batch.of(caches)

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Self:
        """The batch of these sequences' caches, for a class that stands before one of mlx-lm's batch caches."""
        batch = super().merge(rows)
        batch.record_with(rows[0].codec)
        return batch

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = self.quantised(keys, values, keys.shape[-2])
        fetched = super().update_and_fetch(keys, values)
        if _starts_early(rows=keys.shape[0], tokens=keys.shape[-2]):
            mx.async_eval(fetched)
        return fetched

    def quantised(self, keys: mx.array, values: mx.array, kept: int) -> tuple[mx.array, mx.array]:
        """What attention reads of them. The first `kept` tokens are logged."""
        coded: Coded
        tokens, dtype = keys.shape[-2], keys.dtype
        start, self.starts = self.offset if self.starts is None else self.starts, None
        if kept == 1:
            coded, keys, values = self.codec.read_back(keys, values, start)
        else:
            coded = self.codec.encode(keys, values, start)
            keys, values = self.codec.decode(coded, dtype, start)
        self.log.append(Update(coded if kept == tokens else cut_tokens(coded, kept), kept == 1, start))
        return keys, values

    def cut(self, tokens: int) -> None:
        trimmed = super().trim(tokens)
        assert trimmed == tokens
        last = self.log[-1]
        self.log[-1] = last._replace(coded=cut_tokens(last.coded, -tokens))

    def take(self) -> tuple[Words, Words]:
        runs: list[Coded] = []
        for stepped, run in itertools.groupby(self.log, key=attrgetter("stepped")):
            updates = list(run)
            joined = join_tokens([update.coded for update in updates])
            runs.append(apart(self.codec.words_of(joined, updates[0].start) if stepped else joined))
        self.log = []
        keys, values = join_tokens(runs)
        return keys, values

    def arrays(self) -> list[mx.array]:
        held = [] if self.keys is None else [self.keys, self.values]
        return held + [array for update in self.log for words in update.coded for array in words]


class BatchAppendCache(QuantiseFirst, BatchKVCache):
    """Rows of full attention.

    Attributes:
        shapes: those that attention is to be given; None where any will do.
    """

    kind = PartKind.APPEND
    shapes: AttentionShapes | None = None

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
    def _takes_two(self) -> bool:
        """Whether steps feed two tokens a row, the second of which is padding: see `AttentionShapes.decoding`."""
        return self.shapes is not None and not self.even and self._idx >= self.shapes.long

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.shapes is None or self._idx < self.shapes.long:
            return super().update_and_fetch(keys, values)
        start, tokens = self._idx, keys.shape[-2]
        length = self.shapes.length(start + tokens)
        make_room(self, start, length, keys, values)
        if tokens != 2 or not self._takes_two:
            return super().update_and_fetch(keys, values)
        keys, values = self.quantised(keys, values, kept=1)
        self.keys[..., start : start + tokens, :] = keys
        self.values[..., start : start + tokens, :] = values
        self._idx += 1
        self.offset = self.offset + 1
        return self.keys[..., :length, :], self.values[..., :length, :]

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> Any:  # noqa: N803 - mlx-lm's name
        if N == 2 and self.shapes is not None and self._takes_two:
            return self.shapes.row_mask(self._idx, N, self.left_padding)
        if self.even and not return_array and kwargs.get("window_size") is None:
            return None if N == 1 else "causal"  # fused kernels want no array
        return super().make_mask(N, return_array=return_array, **kwargs)


class AppendCache(QuantiseFirst, KVCache, stands_for=KVCache):
    """Full attention: every token is kept.

    Args:
        shapes: those that attention is to be given; None where any will do.
    """

    kind = PartKind.APPEND
    batch = BatchAppendCache

    def __init__(self, codec: LayerCodec, shapes: AttentionShapes | None = None) -> None:
        super().__init__()
        self.record_with(codec)
        self.shapes = shapes

    @classmethod
    def in_place_of(cls, _: Any, codec: LayerCodec, shapes: AttentionShapes | None) -> Self:
        return cls(codec, shapes)

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> Any:  # noqa: N803 - mlx-lm's name
        if N > 1 and self.shapes is not None and (mask := self.shapes.mask(self.offset, N)) is not None:
            return mask
        return super().make_mask(N, return_array=return_array, **kwargs)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.shapes is None:
            return super().update_and_fetch(keys, values)
        tokens = keys.shape[-2]
        length = self.shapes.length(self.offset + tokens)
        make_room(self, self.offset, length, keys, values)
        read = super().update_and_fetch(keys, values)
        return read if tokens == 1 else (self.keys[..., :length, :], self.values[..., :length, :])

    def fill(self, keys: mx.array, values: mx.array, length: int) -> None:
        self.keys, self.values, self.offset = keys, values, length


class LastTokens(QuantiseFirst):
    """Mixin of caches that keep the last tokens, in temporal order when they are filled."""

    kind = PartKind.WINDOW

    def __init__(self, codec: LayerCodec, window: int) -> None:
        super().__init__(window)
        self.record_with(codec)
        self.window = window

    def fill(self, keys: mx.array, values: mx.array, length: int) -> None:
        held = min(length, self.window)
        self.keys, self.values, self.offset = keys[..., -held:, :], values[..., -held:, :], length
        self.begin(held)

    def begin(self, held: int) -> None:
        """Go on behind so many tokens, the last of `offset`."""
        raise NotImplementedError


class BatchWindowCache(QuantiseFirst, BatchRotatingKVCache):
    kind = PartKind.WINDOW


class WindowCache(LastTokens, RotatingKVCache, stands_for=RotatingKVCache):
    """Sliding-window attention."""

    batch = BatchWindowCache

    @classmethod
    def in_place_of(cls, stock: Any, codec: LayerCodec, _: AttentionShapes | None) -> Self | None:
        return cls(codec, stock.max_size) if stock.keep == 0 else None

    def begin(self, held: int) -> None:
        self._idx = held


class ChunkCache(LastTokens, ChunkedKVCache, stands_for=ChunkedKVCache):
    """Chunked attention: at least the tokens of the current chunk are kept."""

    @classmethod
    def in_place_of(cls, stock: Any, codec: LayerCodec, _: AttentionShapes | None) -> Self:
        return cls(codec, stock.chunk_size)

    def begin(self, held: int) -> None:
        self.start_position = self.offset - held


class StateCache(Kept, ArraysCache, stands_for=ArraysCache):
    """Recurrent state: arrays that models replace and never write to."""

    kind = PartKind.STATE
    window = 0
    even = False
    batches = True
    log: tuple[Update, ...] = ()

    @classmethod
    def in_place_of(cls, stock: Any, _codec: LayerCodec, _: AttentionShapes | None) -> Self:
        return cls(len(stock.cache))

    def arrays(self) -> list[mx.array]:
        held: list[Any] = self.cache
        return [array for array in held if array is not None]


def _starts_early(rows: int, tokens: int) -> bool:
    """Whether each layer is computed while Python describes the next one.

    MLX hands few operations to a CPU beyond the one that it works on, so that it would stand still while a step of one
    token is described, for a third of the time. Larger products want all cores, and Python's would be missing there; a
    GPU is kept busy anyway.
    """
    return rows == tokens == 1 and bool(mx.default_device() == mx.cpu)


def empty_caches(model: Any, codecs: CodecPlan, shapes: AttentionShapes | None = None) -> list[Any]:
    """Empty caches for one sequence, as the model makes them, quantising first.

    Args:
        shapes: for caches of full attention, those that attention is to be given.

    Raises:
        OperatorError: for a kind of cache whose content can't be kept.
    """
    numbers = itertools.count()

    def kept(cache: Any, shapes: AttentionShapes | None) -> Any:
        if type(cache) is CacheList:
            return CacheList(*(kept(member, None) for member in cache.caches))
        kind = Kept.standing_for.get(type(cache))
        own = None if kind is None else kind.in_place_of(cache, codecs.of_layer(next(numbers)), shapes)
        if own is None:
            raise OperatorError(
                f"the model keeps its context in a {type(cache).__name__}, which WarmKV can't store and restore; "
                "use a model with another kind of attention"
            )
        return own

    return [kept(cache, shapes) for cache in make_prompt_cache(model)]


def leaves(caches: Sequence[Any]) -> Iterator[LayerCache]:
    """The caches that hold something, composite ones taken apart, in the model's order."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def token_leaves(caches: Sequence[Any]) -> dict[int, TokenCache]:
    """Those of them that keep keys and values, by their number."""
    return {number: cast(TokenCache, leaf) for number, leaf in enumerate(leaves(caches)) if leaf.kind != PartKind.STATE}


def state_leaves(caches: Sequence[Any]) -> dict[int, StateCache]:
    """Those of them that keep recurrent state, by their number."""
    return {number: leaf for number, leaf in enumerate(leaves(caches)) if isinstance(leaf, StateCache)}


def can_batch(caches: Sequence[Any]) -> bool:
    """Whether sequences with these caches can share one decode step."""
    return all(leaf.batches for leaf in leaves(caches))


def arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Every array the caches and their logs hold: what to evaluate so that nothing lazy is left behind."""
    return [array for leaf in leaves(caches) for array in leaf.arrays()]
