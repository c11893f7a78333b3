"""Whether a model's attention takes few shapes. Tried out at load: what a model does with a mask is its own code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.attention_shapes import AttentionShapes
from warmkv_server.engine.cache.codecs import cuda
from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.codec import CodecPlan
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.engine.model.step_plan import NOBODY, Row, StepKind, StepPlan, Wanted

log = logging.getLogger(__name__)

_LONGER, _SHORTER = 7, 4
"""Tokens of the two sequences that are tried."""

_NOISE = 0.1
"""Of the spread of the logits: another order of 16-bit sums moved them by a hundredth, a wrong mask by all of it."""


def attention_shapes(runner: ModelRunner, caches: Sequence[Any]) -> AttentionShapes | None:
    """Those that this model's attention is to be given on this device; None where any will do.

    Args:
        caches: of the model, with something in them.
    """
    if not cuda.is_available() or not all(isinstance(leaf, kinds.AppendCache) for leaf in caches):
        return None
    shapes = AttentionShapes(caches[0].keys.dtype)
    return shapes if takes(runner, shapes) else None


def takes(runner: ModelRunner, shapes: AttentionShapes) -> bool:
    """Whether the model gives with these shapes what it gives without, in a padded chunk and in padded rows.

    For models all of whose caches keep every token. On the MLX thread. Nothing is quantised here: rounding turns words,
    and each of them moves what follows.
    """
    try:
        tried = zip(_tried(runner, replace(shapes, long=0)), _tried(runner, None), strict=True)
        return all(_close(mine, stock) for mine, stock in tried)
    except Exception:
        log.info("the model's attention doesn't take masks of few shapes", exc_info=True)
        return False


def _tried(runner: ModelRunner, shapes: AttentionShapes | None) -> tuple[mx.array, mx.array]:
    """Logits of a chunk and of a step of two rows."""
    own = []
    lengths = _LONGER, _SHORTER
    for length in lengths:
        caches = kinds.empty_caches(runner.model, CodecPlan(AsComputed()), shapes)
        fed, read = (length, length) if shapes is None else shapes.chunk(0, length)
        row = Row(NOBODY, 0, tuple(range(1, length + 1)))
        chunk = StepPlan(StepKind.PROBE, (row,), fed, read, Wanted.LOGITS)
        own.append((caches, runner.probe(chunk, caches)[:, :length]))
    batch = [type(pair[0]).merge(list(pair)) for pair in zip(own[0][0], own[1][0], strict=True)]
    fed, read = (1, _LONGER + 1) if shapes is None else shapes.decoding(lengths)
    rows = tuple(Row(NOBODY, length) for length in lengths)
    step = StepPlan(StepKind.PROBE, rows, fed, read, Wanted.LOGITS)
    return own[0][1], runner.decode(step, batch, mx.full((2,), 1))


def _close(mine: mx.array, stock: mx.array) -> bool:
    mine, stock = mine.astype(mx.float32), stock.astype(mx.float32)
    return bool(mx.abs(mine - stock).mean() <= _NOISE * mx.std(stock))
