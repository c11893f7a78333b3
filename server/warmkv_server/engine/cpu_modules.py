"""Parts of a model in fewer operations, for a device that has no kernels for them.

What a step of one token costs on a CPU is mostly the count of its operations, and there MLX takes its `mx.fast` kernels
apart: a rotation of queries or keys is some twenty-five operations, most of which compute the cosines that every layer
computes again, and a normalisation is seven. Here they are four each. MLX's own way to exchange a model's modules puts
them in place.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.normalization import RMSNorm
from mlx.nn.layers.positional_encoding import RoPE
from mlx.utils import tree_map

_MOST_BYTES = 64 << 20
"""Of one table of positions; models with longer contexts than that holds compute their cosines each time."""


def exchange_modules(model: Module, positions: int) -> None:
    """Put the modules of this file in place of a model's own of the same meaning.

    Args:
        positions: the longest context to be served.
    """
    tables: dict[tuple[int, float, float], Table] = {}

    def counterpart(module: Any) -> Any:
        if type(module) is RMSNorm:
            return RowRMSNorm(module.weight, module.eps)
        if type(module) is RoPE and not module.traditional and Table.nbytes(positions, module.dims) <= _MOST_BYTES:
            key = module.dims, module.base, module.scale
            if key not in tables:
                tables[key] = Table(positions, *key)
            return TableRoPE(module.dims, tables[key])
        return module

    model.update_modules(tree_map(counterpart, model.leaf_modules(), is_leaf=Module.is_module))


class Table:
    """Cosines and sines of every position, (positions, dims), each written out for both halves of a head."""

    def __init__(self, positions: int, dims: int, base: float, scale: float) -> None:
        half = dims // 2
        # The formula of mx.fast.rope, in its order and its precision: the bits are the same.
        frequencies = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(base) / half))
        angles = (mx.arange(positions, dtype=mx.float32) * scale)[:, None] * frequencies
        cosines, sines = mx.cos(angles), mx.sin(angles)
        self.cosines = mx.concatenate([cosines, cosines], axis=-1)
        self.sines = mx.concatenate([-sines, sines], axis=-1)
        mx.eval(self.cosines, self.sines)

    @staticmethod
    def nbytes(positions: int, dims: int) -> int:
        return 2 * positions * dims * 4


class TableRoPE(Module):
    """In place of an `nn.RoPE` that pairs the two halves of a head; gives the same bits."""

    def __init__(self, dims: int, table: Table) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dims = dims
        self._table = table

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate queries or keys, (rows, heads, tokens, head_dim).

        Args:
            offset: position of the first token, or of each row's, (rows,).
        """
        tokens, half = x.shape[-2], self.dims // 2
        at: Any = slice(offset, offset + tokens) if isinstance(offset, int) else _each(offset, tokens)
        turned = mx.concatenate([x[..., half : self.dims], x[..., :half]], axis=-1)
        rotated = x[..., : self.dims] * self._table.cosines[at] + turned * self._table.sines[at]
        if x.shape[-1] == self.dims:
            return rotated
        return mx.concatenate([rotated, x[..., self.dims :]], axis=-1)


def _each(offset: mx.array, tokens: int) -> mx.array:
    """Positions of the rows' tokens, (rows, 1, tokens)."""
    first = offset.reshape(-1, 1, 1)
    return first if tokens == 1 else first + mx.arange(tokens)


class RowRMSNorm(Module):
    """In place of an `nn.RMSNorm`, for steps of one token a row; longer ones go the stock way.

    The mean of the squares is a product of the row with itself, so that bits differ from the stock way's: as they do
    for any product that BLAS computes for one row or for many.
    """

    def __init__(self, weight: mx.array, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = weight
        self.eps = eps
        self._eps = mx.array([[eps]], dtype=mx.float32)
        mx.eval(self._eps)

    def __call__(self, x: mx.array) -> mx.array:
        if x.shape[-2] != 1 or x.dtype != mx.float32:
            return mx.fast.rms_norm(x, self.weight, self.eps)
        mean = mx.addmm(self._eps, x, x.swapaxes(-1, -2), alpha=1 / x.shape[-1])
        return x * mx.rsqrt(mean) * self.weight
