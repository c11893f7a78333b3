"""The change of basis of one stream, from samples of it.

With S the covariance of what is coded and M what an error costs, R the square root of M, and U e U' = R S R, the vector
x R U has uncorrelated values of variance e, errors of which all cost the same. Dividing each by the fourth root of its
variance balances errors against spread, and a Hadamard matrix behind it makes all values equally wide, so that one
scale does for all. Without S and M a Hadamard matrix alone is left.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from warmkv_server.engine.cache.codecs.rotation import Rotation
from warmkv_server.engine.cache.codecs.transform import Basis, Floats
from warmkv_server.engine.model.statistics import StreamSample

_SKIPPED = 8
"""Tokens in the beginning that are unlike those that follow: attention that looks for nothing looks there."""

_FLOOR = 1e-4
"""Of the largest, what an error costs at least in any direction: a text is too short to say that it costs nothing."""

_SHRUNK = 0.02
"""By how much correlations are taken to be smaller than in the sample, for the same reason."""

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


def hadamard(sample: StreamSample, rotation: Rotation | None) -> Basis:
    """Mean removed, and values mixed evenly."""
    mean, spread, first = _centre(sample, rotation)
    size = np.sqrt(np.maximum(np.einsum("hdd->h", spread) / spread.shape[-1], 1e-12))
    mixed = _mixing(spread.shape[-1])
    return Basis.of(size[:, None, None] * mixed.T, mean, first)


def calibrated(sample: StreamSample, rotation: Rotation | None) -> Basis:
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
    # Back from values of variance about one: scaled to it, unmixed, unbalanced, turned back, and no longer weighed.
    width = np.sqrt(np.sqrt(variance).mean(axis=-1))
    back = width[:, None, None] * (_mixing(dims).T @ (variance[:, :, None] ** 0.25 * (axes.swapaxes(1, 2) @ unroot)))
    return Basis.of(back, mean, first)


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
    block = dims & -dims
    mixed = np.ones((1, 1))
    while len(mixed) < block:
        mixed = np.block([[mixed, mixed], [mixed, -mixed]])
    whole = np.kron(np.eye(dims // block), mixed / np.sqrt(block))
    signs = np.where(np.random.default_rng(1).random(dims) < 0.5, -1.0, 1.0)
    return signs[:, None] * whole
