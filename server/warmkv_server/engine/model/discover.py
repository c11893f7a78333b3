"""What a model's caches are made of: found out by running a token through it."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache

from warmkv_server.contract.kv import KVLayout, PartKind, TensorSpec
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.codec import Codec, kernel_reads_back, storable
from warmkv_server.engine.cache.layout import KEYS, VALUES, CacheMap, Stack, empty_caches, state_name
from warmkv_server.engine.model.fitting import few_shapes
from warmkv_server.errors import OperatorError


def discover(model: Any, codec: Codec) -> CacheMap:
    """Run one token through the model and look at what its caches were given.

    Raises:
        OperatorError: when a layer's cache is of a kind that can't be kept, or its head_dim doesn't divide by the
            group size.
    """
    plain = empty_caches(model, Codec(bits=0))
    model(mx.array([[0]]), cache=plain)
    mx.eval(kinds.arrays(plain))
    stacks: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    states: dict[tuple[int, int], mx.Dtype] = {}
    specs: list[TensorSpec] = []
    window = 0
    for number, leaf in enumerate(kinds.leaves(plain)):
        if isinstance(leaf, ArraysCache):
            for index, array in enumerate(leaf.cache):
                if array is not None:
                    states[number, index] = array.dtype
                    specs.append(_state_spec(state_name(number, index), array))
            continue
        if not leaf.log:
            continue  # a layer that reads another layer's KV
        window = max(window, getattr(leaf, "window", 0))
        for side, (values,) in zip((KEYS, VALUES), leaf.take(), strict=True):
            _, heads, _, head_dim = values.shape
            _check_group(codec, number, head_dim)
            stacks.setdefault((leaf.kind, heads, head_dim, values.dtype), []).append((number, side))
    made = []
    for number, ((kind, heads, head_dim, dtype), streams) in enumerate(stacks.items()):
        probe = codec.encode(mx.zeros((1, heads, 1, head_dim), dtype))
        stack = Stack(f"kv{number}", kind, tuple(streams), heads, head_dim, dtype, tuple(p.dtype for p in probe))
        made.append(stack)
        kernel_reads_back(codec, dtype)  # compiled before the first request needs it
        for component, piece in zip(codec.components, probe, strict=True):
            specs.append(_token_spec(stack, component, storable(piece), codec))
    layout = KVLayout(tuple(specs), window)
    return CacheMap(codec, tuple(made), states, layout, few_shapes(model, plain))


def _check_group(codec: Codec, leaf: int, head_dim: int) -> None:
    if codec.bits and head_dim % codec.group_size:
        fitting = next((g for g in (64, 32) if head_dim % g == 0), None)
        remedy = f"--kv-group-size {fitting}" if fitting else "--kv-bits 0 to keep the KV unquantised"
        raise OperatorError(
            f"layer {leaf} has keys or values of dimension {head_dim}, which doesn't divide by the group size "
            f"{codec.group_size}; start with {remedy}"
        )


def _state_spec(name: str, array: mx.array) -> TensorSpec:
    stored = storable(array)
    return TensorSpec(name, PartKind.STATE, _numpy_name(stored), tuple(stored.shape), int(stored.nbytes))


def _token_spec(stack: Stack, component: str, piece: mx.array, codec: Codec) -> TensorSpec:
    shape = (len(stack.streams), stack.heads, piece.shape[-1])
    nbytes = math.prod(shape) * piece.dtype.size
    codecs = (f"affine-{codec.bits}-{codec.group_size}",) * len(stack.streams) if codec.bits else ()
    return TensorSpec(stack.tensor(component), stack.kind, _numpy_name(piece), shape, nbytes, codecs)


def _numpy_name(array: mx.array) -> str:
    return str(np.dtype(str(array.dtype).removeprefix("mlx.core.")))
