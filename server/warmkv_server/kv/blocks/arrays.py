"""What MLX is to the store: memory for arrays, and arrays as memory.

An evaluated array's memory can be seen and filled from any thread; nothing lazy is made here that outlives a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from warmkv_server.contract.kv import PartKind, TensorSpec

Words = NDArray[Any]
"""An array of whatever dtype, looked at as memory."""


def stored_shape(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """(streams, kv_heads, count, width) for kinds that run along tokens; a snapshot's own shape."""
    if spec.kind is PartKind.STATE:
        return spec.shape
    streams, heads, width = spec.shape
    return streams, heads, count, width


def allocate(specs: Iterable[TensorSpec], count: int) -> dict[str, mx.array]:
    """Evaluated arrays for `count` tokens (or a snapshot), by name; `view` gives their memory, to be filled."""
    arrays = {spec.name: mx.zeros(stored_shape(spec, count), getattr(mx, spec.dtype)) for spec in specs}
    mx.eval(arrays)
    return arrays


def view(array: mx.array) -> Words:
    """An evaluated array's memory, not copied. Its dtype must be one that numpy has."""
    return np.array(array, copy=False)
