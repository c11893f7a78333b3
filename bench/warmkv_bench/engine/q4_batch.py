"""4-bit caches that mlx-lm's BatchGenerator takes; used by child.py, in its process alone.

The stock QuantizedKVCache has no `merge`, so BatchGenerator refuses it. These two keep its words and its attention and
add what a batch needs, for rows of one length (which is all that the comparison asks for).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

mx: Any = import_module("mlx.core")
caches: Any = import_module("mlx_lm.models.cache")
causal_mask: Any = import_module("mlx_lm.models.base").create_causal_mask


class Q4Cache(caches.QuantizedKVCache):  # type: ignore[misc]
    """mlx-lm's quantised cache of one sequence, which can become a row of a batch."""

    def size(self) -> int:
        return int(self.offset)

    @classmethod
    def merge(cls, rows: list[Q4Cache]) -> BatchQ4Cache:
        return BatchQ4Cache(rows)


class BatchQ4Cache(Q4Cache):
    """Rows of equal length: one dense quantised cache, whose offset serves all of them."""

    def __init__(self, rows: list[Q4Cache]) -> None:
        super().__init__(rows[0].group_size, rows[0].bits)
        if len({row.offset for row in rows}) > 1:
            raise ValueError("rows must have one length")
        self.offset = rows[0].offset
        if rows[0].keys is not None:
            self.keys = _joined([row.keys for row in rows])
            self.values = _joined([row.values for row in rows])

    def prepare(self, *, left_padding: Any = None, right_padding: Any = None, **_: Any) -> None:
        if any(padding and max(padding) for padding in (left_padding, right_padding)):
            raise ValueError("rows must have one length")

    def finalize(self) -> None:
        """There is no padding to take away."""

    def make_mask(self, tokens: int, window_size: int | None = None, **_: Any) -> Any:
        return None if tokens == 1 else causal_mask(tokens, offset=self.offset, window_size=window_size)

    def filter(self, rows: Any) -> None:
        if self.keys is not None:
            self.keys, self.values = (tuple(part[rows] for part in side) for side in (self.keys, self.values))

    def extend(self, other: BatchQ4Cache) -> None:
        merged = BatchQ4Cache([self, other])
        self.keys, self.values = merged.keys, merged.values

    def extract(self, row: int) -> Q4Cache:
        cache = Q4Cache(self.group_size, self.bits)
        cache.offset = self.offset
        cache.keys, cache.values = (
            tuple(part[row : row + 1, :, : self.offset] for part in side) for side in (self.keys, self.values)
        )
        return cache


def _joined(sides: list[Any]) -> tuple[Any, ...]:
    longest = min(side[0].shape[2] for side in sides)
    return tuple(mx.concatenate([side[i][:, :, :longest] for side in sides]) for i in range(3))
