"""What MLX is to the store: memory for arrays, and arrays as memory.

An evaluated array's memory can be seen and filled from any thread; nothing lazy is made here that outlives a call.

Memory of KV that has left RAM is kept for KV that comes in (`SpareMemory`).

MLX has no array whose memory isn't written to before one gets it, and on a CPU it adopts no one else's memory. Clearing
a block takes about as long as reading it, so the arrays of blocks that nobody holds any more are kept, a few of them,
and written over.

Whether an array is still in use can't be seen from Python: a view of it, or a graph that isn't evaluated yet, may
refer to it. MLX knows: an update of a slice takes place in the memory of its input if nothing else refers to that, and
in a copy otherwise. So every array that is had again goes through an update of one element, and the worst that can
happen is that it costs a copy.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from warmkv_server.contract.kv import TensorSpec, policy_of

RawArray = NDArray[Any]
"""An array of whatever dtype, looked at as memory."""


def stored_shape(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """Of the array for so many tokens, or of a snapshot, as the kind's policy has it."""
    return policy_of(spec.kind).stored_shape(spec, count)


def allocate(specs: Iterable[TensorSpec], count: int) -> dict[str, mx.array]:
    """Evaluated arrays for `count` tokens (or a snapshot), by name; `view` gives their memory, to be filled."""
    arrays = {spec.name: mx.zeros(stored_shape(spec, count), getattr(mx, spec.dtype)) for spec in specs}
    mx.eval(arrays)
    return arrays


def view(array: mx.array) -> RawArray:
    """An evaluated array's memory, not copied. Its dtype must be one that numpy has."""
    return np.array(array, copy=False)


_LEAST = 256 << 10
"""Bytes; smaller arrays are cleared as fast as they are found."""


class RecycledArrays(dict[str, mx.array]):
    """The arrays of one file by name. When nobody holds it any more their memory is spare."""

    def __init__(self, arrays: dict[str, mx.array], spare: SpareMemory) -> None:
        super().__init__(arrays)
        self._spare = spare

    def __del__(self) -> None:
        self._spare.give(self.values())


class SpareMemory:
    """Used from any thread.

    Args:
        limit: bytes that are kept at most; `nbytes` are.

    Attributes:
        resting: nothing is kept until memory is asked for again.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.resting = False
        self._start = mx.array([0])
        self._arrays: deque[mx.array] = deque()
        self.nbytes = 0
        self._lock = threading.Lock()

    def parts(self, wanted: Iterable[tuple[Sequence[TensorSpec], int]]) -> list[RecycledArrays]:
        """Arrays for so many tokens of these tensors (or for snapshots), to be written to through a view.

        What is in them is anything. Nothing that was there before refers to their memory. They are being evaluated, by
        a thread of MLX's: looking at their memory waits for that, and until then the caller has better to do.
        """
        self.resting = False
        parts = [
            RecycledArrays(
                {spec.name: self._array(stored_shape(spec, count), getattr(mx, spec.dtype)) for spec in specs}, self
            )
            for specs, count in wanted
        ]
        mx.async_eval([list(part.values()) for part in parts])
        return parts

    def give(self, arrays: Iterable[mx.array]) -> None:
        """Arrays that the caller won't use again. Never waits: it may run wherever an object is let go of."""
        if self.resting or not self._lock.acquire(blocking=False):
            return
        try:
            for array in arrays:
                if array.nbytes >= _LEAST:
                    self._arrays.append(array)
                    self.nbytes += array.nbytes
            while self.nbytes > self._limit:
                self.nbytes -= self._arrays.popleft().nbytes
        finally:
            self._lock.release()

    def rest(self) -> None:
        """Let go of everything, and keep nothing until memory is asked for again."""
        with self._lock:
            self.resting = True
            self._arrays.clear()
            self.nbytes = 0

    def _array(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Not evaluated. An array that was kept must not be referred to here any more when it will be."""
        kept = self._take(shape, dtype)
        if kept is None:
            return mx.zeros(shape, dtype)
        return mx.slice_update(kept, _one_zero(len(shape), dtype), self._start, (0,))

    def _take(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array | None:
        with self._lock:
            for number, array in enumerate(self._arrays):
                if array.shape == shape and array.dtype == dtype:
                    del self._arrays[number]
                    self.nbytes -= array.nbytes
                    return array
        return None


@cache
def _one_zero(axes: int, dtype: mx.Dtype) -> mx.array:
    """Evaluated, as it is used by many threads."""
    zero = mx.zeros((1,) * axes, dtype)
    mx.eval(zero)
    return zero
