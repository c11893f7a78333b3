"""What a model's keys, values and queries are like: gathered from one run over a text.

Which queries and rotations belong to a layer's keys is found out by watching: the modules that rotate are exchanged for
ones that note what they were given and what they gave, for one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.codec import KEYS, VALUES, CodecPlan, Stream
from warmkv_server.engine.cache.codecs.transform import Floats
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.engine.model.step_plan import NOBODY, Row, StepKind, StepPlan, Wanted

_OUTPUTS = ("o_proj", "out_proj", "wo", "dense", "c_proj", "attn_out", "output_proj")
"""What mlx-lm's classes call the product behind attention."""


@dataclass
class Rotated:
    """One call of a module that rotates."""

    name: str
    before: mx.array
    after: mx.array


@dataclass(frozen=True)
class StreamSample:
    """What was computed of one stream.

    Attributes:
        values: of the text, (heads, tokens, head_dim), as attention reads them.
        firsts: of tokens that each stand at position 0, (heads, tokens, head_dim).
        positions: of the text's tokens.
        rotated_by: the name of the module that rotated them; "" if none did that is known.
        queries: of the same layer before their rotation, (heads, those of all its query heads, head_dim); None if not
            known, and of values.
        output: what an error of values costs: the Gram matrix of the product behind attention, (heads, head_dim,
            head_dim); None if not known.
    """

    values: Floats
    firsts: Floats
    positions: NDArray[np.int64]
    rotated_by: str = ""
    queries: Floats | None = None
    output: Floats | None = None


class _Watched(Module):
    """In place of a module that rotates."""

    def __init__(self, name: str, module: Any, calls: list[Rotated]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = name, module, calls

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            return super().__getattr__(key)
        return getattr(self._watched[1], key)

    def __call__(self, x: mx.array, *positions: Any, **named: Any) -> Any:
        name, module, calls = self._watched
        rotated = module(x, *positions, **named)
        if isinstance(rotated, mx.array):
            calls.append(Rotated(name, x, rotated))
        return rotated


def sample(runner: ModelRunner, tokens: Sequence[int], firsts: Sequence[int]) -> dict[Stream, StreamSample]:
    """Run a text, and tokens each of which stands alone. On the MLX thread.

    Nothing is kept of layers that have recurrent state, or read another layer's KV.
    """
    with _watching(runner.model) as calls:
        computed = _computed(runner, StepPlan.probe(tokens, wanted=Wanted.NOTHING))
    alone = _computed(runner, _each_alone(firsts))
    names = dict(runner.model.named_modules())
    found: dict[Stream, StreamSample] = {}
    for (leaf, side), values in computed.items():
        heads, dims = values.shape[1], values.shape[-1]
        keys = _call_that_gave(computed[leaf, KEYS], calls)
        queries = _queries_call(keys, calls, computed[leaf, KEYS].shape[1]) if keys is not None else None
        rotated = keys if side == KEYS else _call_that_gave(values, calls)
        asked = cost = None
        if keys is not None and queries is not None:
            if side == KEYS:
                asked = _floats(queries.before)[0].reshape(heads, -1, dims)
            else:
                attention = names.get(keys.name.rpartition(".")[0])
                cost = _output(attention, heads, queries.before.shape[1], dims)
        found[leaf, side] = StreamSample(
            _floats(values)[0],
            _floats(alone[leaf, side])[:, :, 0].swapaxes(0, 1),
            np.arange(values.shape[-2]),
            rotated.name if rotated is not None else "",
            asked,
            cost,
        )
    return found


def _each_alone(tokens: Sequence[int]) -> StepPlan:
    rows = tuple(Row(NOBODY, 0, (token,)) for token in tokens)
    return StepPlan(StepKind.PROBE, rows, 1, 1, Wanted.NOTHING)


def _computed(runner: ModelRunner, plan: StepPlan) -> dict[Stream, mx.array]:
    caches = kinds.empty_caches(runner.model, CodecPlan(AsComputed()))
    runner.probe(plan, caches)
    streams: dict[Stream, mx.array] = {}
    for number, leaf in kinds.token_leaves(caches).items():
        if leaf.log:
            (update,) = leaf.log
            for side, words in zip((KEYS, VALUES), update.coded, strict=True):
                streams[number, side] = words[0]
    mx.eval(list(streams.values()))
    return streams


@contextmanager
def _watching(model: Any) -> Iterator[list[Rotated]]:
    calls: list[Rotated] = []
    rotating = {name: module for name, module in model.named_modules() if _rotates(module)}
    model.update_modules(tree_unflatten([(name, _Watched(name, each, calls)) for name, each in rotating.items()]))
    try:
        yield calls
    finally:
        model.update_modules(tree_unflatten(list(rotating.items())))


def _rotates(module: Any) -> bool:
    name = type(module).__name__.lower()
    return ("rope" in name or "rotary" in name) and not module.children()


def _call_that_gave(values: mx.array, calls: Sequence[Rotated]) -> Rotated | None:
    for call in calls:
        if call.after is values:
            return call
    for call in calls:
        if call.after.shape == values.shape and bool(mx.array_equal(call.after, values)):
            return call
    return None


def _queries_call(keys: Rotated, calls: Sequence[Rotated], heads: int) -> Rotated | None:
    """That of the same module that rotated the queries."""
    rows, _, tokens, dims = keys.before.shape
    for call in calls:
        many = call.before.shape[1]
        fits = call.name == keys.name and call.before.shape == (rows, many, tokens, dims) and many % heads == 0
        if fits and call is not keys:
            return call
    return None


def _output(attention: Any, heads: int, query_heads: int, dims: int) -> Floats | None:
    """The Gram matrix of what is done with each head's values."""
    for name in _OUTPUTS:
        product = attention.get(name) if isinstance(attention, Module) else None
        if product is None:
            continue
        weights = _weights(product, query_heads * dims)
        if weights is not None:
            grouped = weights.reshape(heads, query_heads // heads, dims, -1)
            gram: Floats = (grouped @ grouped.swapaxes(2, 3)).sum(axis=1)
            return gram
    return None


def _weights(product: Any, inputs: int) -> Floats | None:
    """Of a product, (inputs, outputs), whatever it is made of; None if it takes other inputs."""
    if "weight" in product and "scales" not in product:
        weight = product.weight
        return _floats(weight).T if weight.ndim == 2 and weight.shape[1] == inputs else None
    try:
        read: Floats = _floats(product(mx.eye(inputs)[None]) - product(mx.zeros((1, 1, inputs))))[0]
    except (ValueError, TypeError):
        return None
    return read


def _floats(values: mx.array) -> Floats:
    return np.array(values.astype(mx.float32), dtype=np.float64)
