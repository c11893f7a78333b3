"""Parts of a model in fewer operations, for a device that has no kernels for them.

What a step of one token costs on a CPU is mostly the count of its operations, and there MLX takes its `mx.fast` kernels
apart: a rotation of queries or keys is some twenty-five operations, most of which compute the cosines that every layer
computes again, and a normalisation is seven. Broadcasts, transpositions and changes of shape are operations too, though
they compute nothing; so what a step of one row needs is kept here in the shape in which it is needed. MLX's own way to
exchange a model's modules puts these in place.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
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
        if type(module) is Linear:
            return RowLinear(module.weight, module.get("bias"))
        if type(module) is Embedding:
            return RowEmbedding(module.weight)
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
        self._offset = -1
        self._rows: dict[tuple[int, ...], tuple[mx.array, mx.array]] = {}

    def rows(self, offset: int, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """Cosines and sines for tokens from this position on, broadcast to a shape: the same for every layer."""
        if offset != self._offset:
            self._offset, self._rows = offset, {}
        if shape not in self._rows:
            at = slice(offset, offset + shape[-2])
            self._rows[shape] = mx.broadcast_to(self.cosines[at], shape), mx.broadcast_to(self.sines[at], shape)
        return self._rows[shape]

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
        half = self.dims // 2
        turning = x[..., : self.dims]
        if isinstance(offset, int):
            cosines, sines = self._table.rows(offset, turning.shape)
        else:
            at = _each(offset, x.shape[-2])
            cosines, sines = self._table.cosines[at], self._table.sines[at]
        turned = mx.concatenate([x[..., half : self.dims], x[..., :half]], axis=-1)
        rotated = turning * cosines + turned * sines
        if x.shape[-1] == self.dims:
            return rotated
        return mx.concatenate([rotated, x[..., self.dims :]], axis=-1)


def _each(offset: mx.array, tokens: int) -> mx.array:
    """Positions of the rows' tokens, (rows, 1, tokens)."""
    first = offset.reshape(-1, 1, 1)
    return first if tokens == 1 else first + mx.arange(tokens)


class RowRMSNorm(Module):
    """In place of an `nn.RMSNorm`, for steps of one token a row; longer ones go the stock way.

    The sum of the squares is a product of the row with itself, so that bits differ from the stock way's: as they do
    for any product that BLAS computes for one row or for many. That it is no mean is made up for in the other factors.
    """

    def __init__(self, weight: mx.array, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = weight
        self.eps = eps
        dims = weight.size
        self._row_weight = (weight * math.sqrt(dims))[None, None]
        self._row_eps = mx.array([[[eps * dims]]], dtype=mx.float32)
        mx.eval(self._row_weight, self._row_eps)

    def __call__(self, x: mx.array) -> mx.array:
        if x.shape[-2] != 1 or x.dtype != mx.float32:
            return mx.fast.rms_norm(x, self.weight, self.eps)
        squares = x @ x.swapaxes(-1, -2)
        return x * mx.rsqrt(squares + self._row_eps) * self._row_weight


class RowLinear(Linear):
    """In place of an `nn.Linear`; gives the same bits. One row goes through one operation instead of four."""

    def __init__(self, weight: mx.array, bias: mx.array | None) -> None:
        Module.__init__(self)
        self.weight = weight
        if bias is not None:
            self.bias = bias
        self._row = RowProduct(weight, bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self._row(x) if self._row.takes(x) else super().__call__(x)


class RowEmbedding(Embedding):
    """In place of an `nn.Embedding` whose weights may be those of the last product as well; gives the same bits."""

    def __init__(self, weight: mx.array) -> None:
        Module.__init__(self)
        self.weight = weight
        self._row = RowProduct(weight)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._row(x) if self._row.takes(x) else super().as_linear(x)  # type: ignore[no-untyped-call]


class RowProduct:
    """Product with weights, (outputs, inputs), for one row: a view of them that needs no change of shape.

    MLX flattens what has more axes than the weights, and shapes the product back.
    """

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        self._inputs = weight.shape[1]
        self._weight = weight.T[None]
        self._bias = None if bias is None else bias[None, None]
        mx.eval(self._weight, self._bias)

    def takes(self, x: mx.array) -> bool:
        """Whether it is of shape (1, 1, inputs)."""
        return x.ndim == 3 and x.size == self._inputs

    def __call__(self, x: mx.array) -> mx.array:
        # Not addmm: of the same row and bias it gave other last bits now and then, in the middle of a model.
        product = x @ self._weight
        return product if self._bias is None else product + self._bias
