"""Whether a model's attention takes few shapes. Tried out at load: what a model does with a mask is its own code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache import cuda_codec
from warmkv_server.engine.cache.attention_shapes import FewShapes, feed
from warmkv_server.engine.cache.codec import Codec

log = logging.getLogger(__name__)

_LONGER, _SHORTER = 7, 4
"""Tokens of the two sequences that are tried."""

_NOISE = 0.1
"""Of the spread of the logits: another order of 16-bit sums moved them by a hundredth, a wrong mask by all of it."""


def few_shapes(model: Any, caches: Sequence[Any]) -> FewShapes | None:
    """Those that this model's attention is to be given on this device; None where any will do.

    Args:
        caches: of the model, with something in them.
    """
    if not cuda_codec.is_available() or not all(isinstance(leaf, kinds.AppendCache) for leaf in caches):
        return None
    shapes = FewShapes(caches[0].keys.dtype)
    return shapes if takes(model, shapes) else None


def takes(model: Any, shapes: FewShapes) -> bool:
    """Whether the model gives with these shapes what it gives without, in a padded chunk and in padded rows.

    For models all of whose caches keep every token. On the MLX thread. Nothing is quantised here: rounding turns words,
    and each of them moves what follows.
    """
    try:
        tried = zip(_tried(model, replace(shapes, long=0)), _tried(model, None), strict=True)
        return all(_close(mine, stock) for mine, stock in tried)
    except Exception:
        log.info("the model's attention doesn't take masks of few shapes", exc_info=True)
        return False


def _tried(model: Any, shapes: FewShapes | None) -> tuple[mx.array, mx.array]:
    """Logits of a chunk and of a step of two rows."""
    own = []
    for tokens in (_LONGER, _SHORTER):
        caches = [kinds.quantise_first(cache, Codec(bits=0), shapes) for cache in make_prompt_cache(model)]
        own.append((caches, feed(model, caches, [range(1, tokens + 1)], shapes)[:, :tokens]))
    rows = [type(pair[0]).merge(list(pair)) for pair in zip(own[0][0], own[1][0], strict=True)]
    two = rows[0].wants_two
    step = model(mx.full((2, 2 if two else 1), 1), cache=rows)[:, 0]
    return own[0][1], step


def _close(mine: mx.array, stock: mx.array) -> bool:
    mine, stock = mine.astype(mx.float32), stock.astype(mx.float32)
    return bool(mx.abs(mine - stock).mean() <= _NOISE * mx.std(stock))
