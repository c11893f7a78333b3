"""What a model's caches are made of: found out by running a token through it."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from warmkv_server.contract.kv import KVLayout, PartKind, TensorSpec
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.codec import (
    KEYS,
    VALUES,
    CodecPlan,
    Component,
    Stream,
    storable,
    stored_as,
)
from warmkv_server.engine.cache.layout import CacheMap, Stack, state_name
from warmkv_server.engine.model.fitting import attention_shapes
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.engine.model.step_plan import StepPlan, Wanted
from warmkv_server.errors import OperatorError


def discover(runner: ModelRunner, codecs: CodecPlan) -> CacheMap:
    """Run one token through the model and look at what its caches were given.

    Raises:
        OperatorError: when a layer's cache is of a kind that can't be kept, or its keys or values can't be coded.
    """
    plain = kinds.empty_caches(runner.model, CodecPlan(AsComputed()))
    runner.probe(StepPlan.probe([0], wanted=Wanted.NOTHING), plain)
    mx.eval(kinds.arrays(plain))
    stacks: dict[tuple[Any, ...], list[Stream]] = {}
    states: dict[tuple[int, int], mx.Dtype] = {}
    specs: list[TensorSpec] = []
    window = 0
    for number, state in kinds.state_leaves(plain).items():
        for index, array in enumerate(state.cache):
            if array is not None:
                states[number, index] = array.dtype
                specs.append(_state_spec(state_name(number, index), array))
    for number, leaf in kinds.token_leaves(plain).items():
        if not leaf.log:
            continue  # a layer that reads another layer's KV
        window = max(window, leaf.window)
        computed = [words[0] for words in leaf.take()]
        for side, values in zip((KEYS, VALUES), computed, strict=True):
            _, heads, _, head_dim = values.shape
            components = _components(codecs, (number, side), head_dim, values.dtype)
            stacks.setdefault((leaf.kind, heads, head_dim, values.dtype, components), []).append((number, side))
        # What a step of decoding does is compiled before the first request needs it.
        mx.eval(codecs.of_layer(number).read_back(computed[KEYS], computed[VALUES], 0)[1:])
    made = []
    for number, ((kind, heads, head_dim, dtype, components), streams) in enumerate(stacks.items()):
        stack = Stack(f"kv{number}", kind, tuple(streams), heads, head_dim, dtype, components)
        made.append(stack)
        specs += [_token_spec(stack, component, codecs) for component in components]
    layout = KVLayout(tuple(specs), window)
    return CacheMap(codecs, tuple(made), states, layout, attention_shapes(runner, plain))


def _components(codecs: CodecPlan, stream: Stream, head_dim: int, dtype: mx.Dtype) -> tuple[Component, ...]:
    """Of a stream's words."""
    try:
        return codecs.of_stream(stream).components(head_dim, dtype)
    except OperatorError as error:
        raise OperatorError(f"layer {stream[0]} has {error}") from error


def _state_spec(name: str, array: mx.array) -> TensorSpec:
    stored = storable(array)
    return TensorSpec(name, PartKind.STATE, stored_as(array.dtype), tuple(stored.shape), int(stored.nbytes))


def _token_spec(stack: Stack, component: Component, codecs: CodecPlan) -> TensorSpec:
    shape = (len(stack.streams), stack.heads, component.width)
    nbytes = math.prod(shape) * component.dtype.size
    names = tuple(codecs.of_stream(stream).identity for stream in stack.streams)
    coded = names if any(names) else ()
    return TensorSpec(stack.tensor(component), stack.kind, stored_as(component.dtype), shape, nbytes, coded)
