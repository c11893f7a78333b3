"""Medians, and how far to trust them.

Timings have long tails and few samples, so: medians, percentile bootstrap intervals from 5 samples on, the range below
that, and no 99th percentile below 100 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

LEAST_FOR_INTERVAL = 5
LEAST_FOR_P99 = 100
RESAMPLES = 10_000
# Fixed, so that the same samples always give the same report.
BOOTSTRAP_SEED = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median with its range, and a 95% confidence interval where there are enough samples; in the samples' unit."""

    n: int
    median: float
    least: float
    most: float
    ci95: tuple[float, float] | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two medians, with a 95% confidence interval where there are enough samples."""

    n: int
    ratio: float
    ci95: tuple[float, float] | None


class Verdict(StrEnum):
    """SLOWER and FASTER: by more than the tolerance. SAME: within it. UNCLEAR: the interval reaches over its edge."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"
    UNCLEAR = "unclear"
    TOO_FEW = "too few samples"


def estimate(samples: Sequence[float]) -> Estimate | None:
    """Summarises samples; None if there are none."""
    if not samples:
        return None
    values = np.asarray(samples, dtype=np.float64)
    enough = len(values) >= LEAST_FOR_INTERVAL
    return Estimate(
        n=len(values),
        median=float(np.median(values)),
        least=float(values.min()),
        most=float(values.max()),
        ci95=_interval(_resampled_medians(values, _indices(len(values)))) if enough else None,
        p99=float(np.percentile(values, 99)) if len(values) >= LEAST_FOR_P99 else None,
    )


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio | None:
    """The ratio of the medians of samples taken in pairs, element by element; None if there are none.

    Pairs are resampled together: what slowed a whole repetition down does not widen the interval.

    Raises:
        ValueError: the lengths differ.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators for {len(denominators)} denominators")
    if not numerators:
        return None
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    picks = _indices(len(above))
    ratios = _resampled_medians(above, picks) / _resampled_medians(below, picks)
    return Ratio(
        n=len(above),
        ratio=float(np.median(above) / np.median(below)),
        ci95=_interval(ratios) if len(above) >= LEAST_FOR_INTERVAL else None,
    )


def unpaired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio | None:
    """The ratio of the medians of two independent sets of samples; None if either is empty."""
    if not numerators or not denominators:
        return None
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    least = min(len(above), len(below))
    ratios = _resampled_medians(above, _indices(len(above))) / _resampled_medians(
        below, _indices(len(below), BOOTSTRAP_SEED + 1)
    )
    return Ratio(
        n=least,
        ratio=float(np.median(above) / np.median(below)),
        ci95=_interval(ratios) if least >= LEAST_FOR_INTERVAL else None,
    )


def verdict(ratio: Ratio, tolerance: float) -> Verdict:
    """What a ratio of times, new by old, lets one say; a `tolerance` of 0.1 means that 10% does not matter."""
    if ratio.ci95 is None:
        return Verdict.TOO_FEW
    low, high = ratio.ci95
    if low > 1 + tolerance:
        return Verdict.SLOWER
    if high < 1 / (1 + tolerance):
        return Verdict.FASTER
    if low >= 1 / (1 + tolerance) and high <= 1 + tolerance:
        return Verdict.SAME
    return Verdict.UNCLEAR


def _indices(size: int, seed: int = BOOTSTRAP_SEED) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, size, size=(RESAMPLES, size))


def _resampled_medians(values: NDArray[np.float64], picks: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(np.median(values[picks], axis=1), dtype=np.float64)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
