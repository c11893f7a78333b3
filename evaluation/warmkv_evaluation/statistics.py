"""Means over windows of text, and how far they can be trusted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000

Floats = NDArray[np.float64]


def interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap confidence interval of the mean.

    Args:
        values: one for each window. Tokens of a window depend on each other, so windows are resampled, not tokens.
    """
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def median_interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap confidence interval of the median."""
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return float(low), float(high)


def median_ratio(above: Floats, below: Floats, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The ratio of two medians and its 95% interval; samples taken in pairs are resampled in pairs."""
    draws = np.random.default_rng(seed).integers(0, len(above), (RESAMPLES, len(above)))
    low, high = np.percentile(np.median(above[draws], axis=1) / np.median(below[draws], axis=1), [2.5, 97.5])
    return float(np.median(above) / np.median(below)), (float(low), float(high))
