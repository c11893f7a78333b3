"""KV on its way between two sequences, as the store hands it on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from warmkv_server.contract.kv import Growth, KVLayout, PartKind, Reuse, Span, Tensors
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.caches import empty_caches
from warmkv_server.engine.cache.layout import CacheMap


def compute(
    model: Any, cache_map: CacheMap, caches: Sequence[Any], tokens: Sequence[int], start: int, ends: Iterable[int]
) -> list[Span]:
    """Run tokens[start:] through the model, a chunk up to each of `ends`, and take the KV of each chunk."""
    spans = []
    for end in ends:
        model(mx.array([tokens[start:end]]), cache=caches)
        mx.eval(kinds.arrays(caches))
        parts: dict[PartKind, Tensors] = dict(cache_map.drain(caches, rows=1)[0]) if cache_map.stacks else {}
        if cache_map.states:
            parts[PartKind.STATE] = cache_map.snapshot(caches)
        mx.eval([list(tensors.values()) for tensors in parts.values()])
        spans.append(Span(start, end - start, parts))
        start = end
    return spans


def filled(model: Any, cache_map: CacheMap, spans: Sequence[Span], length: int, room: int = 0) -> list[Any]:
    """Fresh caches that start after the first `length` tokens."""
    caches = empty_caches(model, cache_map.codecs)
    for _ in cache_map.fill(caches, Reuse(length, tuple(spans)), room):
        pass
    mx.eval(kinds.arrays(caches))
    return caches


def cut(span: Span, start: int, end: int) -> Span:
    """The part of a span that lies in [start, end); recurrent state only if it ends there."""
    start, end = max(start, span.start), min(end, span.end)
    parts: dict[PartKind, Tensors] = {}
    for kind, tensors in span.parts.items():
        if kind == PartKind.STATE:
            if end == span.end:
                parts[kind] = tensors
        else:
            first, last = start - span.start, end - span.start
            parts[kind] = {name: array[:, :, first:last] for name, array in tensors.items()}
    mx.eval([list(tensors.values()) for tensors in parts.values()])
    return Span(start, end - start, parts)


def needed(spans: Sequence[Span], layout: KVLayout, length: int) -> list[Span]:
    """What must be kept of these spans to go on after `length` tokens: nothing before a window, one snapshot."""
    edge = max(0, length - layout.window)
    kept = []
    for span in spans:
        for piece in (cut(span, span.start, edge), cut(span, edge, length)):
            if piece.count <= 0:
                continue
            parts = dict(piece.parts)
            if piece.end <= edge:
                parts.pop(PartKind.WINDOW, None)
            if piece.end < length:
                parts.pop(PartKind.STATE, None)
            kept.append(Span(piece.start, piece.count, parts))
    return kept


def from_disk(spans: Sequence[Span]) -> list[Span]:
    """The same spans, through bytes."""

    def read(array: mx.array) -> mx.array:
        values = np.array(array)
        return mx.array(np.frombuffer(values.tobytes(), values.dtype).reshape(values.shape))

    return [
        Span(
            span.start,
            span.count,
            {kind: {name: read(a) for name, a in tensors.items()} for kind, tensors in span.parts.items()},
        )
        for span in spans
    ]


def grown(growths: Sequence[Growth], length: int) -> list[Span]:
    """The spans of a context that grew in these steps."""
    spans = []
    for growth in growths:
        parts = dict(growth.tensors)
        if length in growth.snapshots and growth.end == length:
            parts[PartKind.STATE] = growth.snapshots[length]
        spans.append(Span(growth.start, growth.count, parts))
    return spans


def equal(left: mx.array, right: mx.array) -> bool:
    """Bit for bit."""
    return left.dtype == right.dtype and left.shape == right.shape and bool(mx.array_equal(left, right))


def distance(left: mx.array, right: mx.array) -> float:
    """The largest difference of two values at the same place."""
    return cast(float, mx.abs(left - right).max().item())
