"""What MLX is to the store: memory for arrays, and arrays as memory.

An evaluated array's memory can be seen and filled from any thread; nothing lazy is made here that outlives a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from warmkv_server.contract.kv import TensorSpec, policy_of

Words = NDArray[Any]
"""An array of whatever dtype, looked at as memory."""


def stored_shape(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """Of the array for so many tokens, or of a snapshot, as the kind's policy has it."""
    return policy_of(spec.kind).stored_shape(spec, count)


def allocate(specs: Iterable[TensorSpec], count: int) -> dict[str, mx.array]:
    """Evaluated arrays for `count` tokens (or a snapshot), by name; `view` gives their memory, to be filled."""
    arrays = {spec.name: mx.zeros(stored_shape(spec, count), getattr(mx, spec.dtype)) for spec in specs}
    mx.eval(arrays)
    return arrays


def view(array: mx.array) -> Words:
    """An evaluated array's memory, not copied. Its dtype must be one that numpy has."""
    return np.array(array, copy=False)
