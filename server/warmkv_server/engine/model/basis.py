"""The change of basis of one stream, from samples of it.

With S the covariance of what is coded and M what an error costs, R the square root of M, and U e U' = R S R, the vector
x R U has uncorrelated values of variance e, errors of which all cost the same. Dividing each by the fourth root of its
variance balances errors against spread. In the order of their variance the values are cut into parts, whose words get
the lengths with which errors cost least, and a matrix that mixes them makes all values of a part equally wide: a step
is the same in all parts, so that one scale does for all. Without S and M the mixing alone is left.
"""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import mlx.core as mx
import numpy as np

from warmkv_server.engine.cache.codecs.packing import EIGHT
from warmkv_server.engine.cache.codecs.rotation import Rotation
from warmkv_server.engine.cache.codecs.transform import Basis, Floats
from warmkv_server.engine.model.statistics import StreamSample

_SKIPPED = 8
"""Tokens in the beginning that are unlike those that follow: attention that looks for nothing looks there."""

_FLOOR = 1e-2
"""Of the largest, what an error costs at least in any direction: a text is too short to say that it costs nothing."""

_SHRUNK = 0.02
"""By how much correlations are taken to be smaller than in the sample, for the same reason."""

_PARTS = 4
"""Of a head's values, in each of which all words have the same length."""

_APART = 2
"""Bits by which the length of a part's words differs at most from the one that is asked for."""

_DISTANCES = np.unique(np.concatenate([np.arange(16), np.logspace(1.3, 3.6, 32).astype(np.int64)]))
"""Between a query and a key, in tokens: over these the cost of an error is averaged."""


def still(sample: StreamSample, rotation: Rotation | None) -> Floats:
    """A text's values as they were before they were rotated, (heads, tokens, head_dim)."""
    if rotation is None:
        return sample.values
    rows = np.array(rotation.rows[mx.array(sample.positions)], dtype=np.float64)
    turned = sample.values[..., rotation.partner]
    back: Floats = (sample.values * rows[:, 0] - turned * rows[:, 1]) / rotation.gain
    return back


def cost(sample: StreamSample, rotation: Rotation | None) -> Floats:
    """What an error costs, (heads, head_dim, head_dim): of keys by the queries that meet them, of values by what is
    done with them. Where that isn't known all directions count alike."""
    heads, _, dims = sample.values.shape
    if sample.output is not None:
        return sample.output
    if sample.queries is None:
        return np.tile(np.eye(dims), (heads, 1, 1))
    queries = sample.queries
    moment: Floats = queries.swapaxes(1, 2) @ queries / queries.shape[1]
    if rotation is None:
        return moment
    distances = _DISTANCES[len(rotation.rows) > _DISTANCES]
    turns = [rotation.matrix(int(distance)) for distance in distances]
    return sum((turn.T @ moment @ turn for turn in turns), np.zeros_like(moment)) / len(turns)


def hadamard(sample: StreamSample, rotation: Rotation | None, bits: int) -> Basis:
    """Mean removed, and values mixed evenly."""
    mean, spread, first = _centre(sample, rotation)
    size = np.sqrt(np.maximum(np.einsum("hdd->h", spread) / spread.shape[-1], 1e-12))
    mixed = _mixing(spread.shape[-1])
    return Basis.of(np.full(len(mixed), float(bits)), size[:, None, None] * mixed.T, mean, first)


def calibrated(sample: StreamSample, rotation: Rotation | None, bits: int) -> Basis:
    """The whole of it."""
    mean, spread, first = _centre(sample, rotation)
    dims = spread.shape[-1]
    spread = spread * (1 - _SHRUNK) + _SHRUNK * spread * np.eye(dims)
    weights, axes = np.linalg.eigh(cost(sample, rotation))
    weights = np.maximum(weights, np.maximum(weights.max(axis=-1, keepdims=True) * _FLOOR, 1e-30))
    root = (axes * np.sqrt(weights)[:, None]) @ axes.swapaxes(1, 2)
    unroot = (axes / np.sqrt(weights)[:, None]) @ axes.swapaxes(1, 2)
    variance, axes = np.linalg.eigh(root @ spread @ root)
    variance = np.maximum(variance, np.maximum(variance.max(axis=-1, keepdims=True) * 1e-7, 1e-30))
    variance, axes = variance[:, ::-1], axes[..., ::-1]
    words = _words(variance, bits)
    # Back from values as wide as their words are long: scaled to it, unmixed, unbalanced, turned back, and no longer
    # weighed.
    balanced = variance[:, :, None] ** 0.25 * (axes.swapaxes(1, 2) @ unroot)
    parts = [
        np.sqrt(np.sqrt(variance[:, part]).mean(axis=-1))[:, None, None]
        * (_mixing(part.stop - part.start).T @ balanced[:, part])
        * 2.0 ** (bits - words[part.start])
        for part in _parts(words)
    ]
    return Basis.of(words, np.concatenate(parts, axis=1), mean, first)


def _parts(words: Floats) -> list[slice]:
    edges = [0, *(np.flatnonzero(np.diff(words)) + 1).tolist(), len(words)]
    return [slice(start, end) for start, end in pairwise(edges)]


def _words(variance: Floats, bits: int) -> Floats:
    """Lengths of the words of values that have these variances, (heads, head_dim), the largest first: on average a
    quarter of a bit more than is asked for, where heads can be cut into parts."""
    heads, dims = variance.shape
    if dims % (_PARTS * EIGHT) or bits == EIGHT:
        return np.full(dims, float(bits))
    # Of each part, what errors cost with words of no length.
    costs = np.square(np.sqrt(variance).reshape(heads, _PARTS, -1).mean(axis=-1))
    costs = (costs / costs.sum(axis=-1, keepdims=True)).mean(axis=0)
    lengths = range(max(1, bits - _APART), min(EIGHT, bits + _APART) + 1)
    choices = combinations_with_replacement(reversed(lengths), _PARTS)
    fitting = [np.array(choice, dtype=np.float64) for choice in choices if sum(choice) == _PARTS * bits + 1]
    best = min(fitting, key=lambda choice: float((costs * 4.0**-choice).sum()))
    return np.repeat(best, dims // _PARTS)


def _centre(sample: StreamSample, rotation: Rotation | None) -> tuple[Floats, Floats, Floats]:
    """Mean and covariance, and the mean of what stands at position 0."""
    values = still(sample, rotation)[:, sample.positions >= _SKIPPED]
    mean = values.mean(axis=1)
    centred = values - mean[:, None]
    spread = centred.swapaxes(1, 2) @ centred / values.shape[1]
    dims = spread.shape[-1]
    spread = spread + np.maximum(1e-6 * np.einsum("hdd->h", spread) / dims, 1e-12)[:, None, None] * np.eye(dims)
    # Position 0 isn't turned, but may be scaled.
    scaled = np.array(rotation.rows[0, 0], dtype=np.float64) if rotation is not None else 1.0
    return mean, spread, (sample.firsts / scaled).mean(axis=1)


def _mixing(dims: int) -> Floats:
    """An orthogonal matrix that mixes values evenly, with random signs, so that no single one of them, nor any
    direction that a model would have, comes out the same everywhere. (dims, dims)"""
    mixed: Floats
    if dims & (dims - 1):
        angles = 2 * np.pi / dims * np.outer(np.arange(dims), np.arange(dims))
        mixed = (np.cos(angles) + np.sin(angles)) / np.sqrt(dims)  # Hartley's
    else:
        mixed = np.ones((1, 1))
        while len(mixed) < dims:
            mixed = np.block([[mixed, mixed], [mixed, -mixed]]) / np.sqrt(2)
    signs = np.where(np.random.default_rng(1).random(dims) < 0.5, -1.0, 1.0)
    turned: Floats = signs[:, None] * mixed
    return turned
