"""How far the loading of a model is: what is done with its weights is done in portions, and each of them is told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

LoadProgress = Callable[[str, int, int], object]
"""Is told what is done now, how many bytes of that are done, and of how many. On the MLX thread."""

_PORTION = 64 << 20
"""Bytes. So many at a time load as fast as all at once."""


def untold(_what: str, _done: int, _total: int) -> None:
    """For who doesn't want to know."""


def evaluate(model: Any, what: str, tell: LoadProgress) -> None:
    """Have all weights of a model computed, which are read from their files by that."""
    arrays = [array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))]
    total = sum(array.nbytes for array in arrays)
    done, portion, nbytes = 0, list[mx.array](), 0
    for array in arrays:
        portion.append(array)
        nbytes += array.nbytes
        if nbytes >= _PORTION:
            mx.eval(portion)
            done += nbytes
            tell(what, done, total)
            portion, nbytes = [], 0
    mx.eval(portion)
    tell(what, total, total)
