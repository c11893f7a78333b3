"""Medians, intervals and verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from warmkv_bench.stats import Ratio, Verdict, estimate, paired_ratio, unpaired_ratio, verdict


def test_few_samples_have_a_range_and_no_interval() -> None:
    found = estimate([3.0, 1.0, 2.0, 10.0])
    assert found is not None
    assert (found.n, found.median, found.least, found.most) == (4, 2.5, 1.0, 10.0)
    assert found.ci95 is None
    assert found.p99 is None


def test_no_samples_have_no_estimate() -> None:
    assert estimate([]) is None
    assert paired_ratio([], []) is None
    assert unpaired_ratio([], [1.0]) is None


def test_the_99th_percentile_needs_100_samples() -> None:
    values = [float(value) for value in range(100)]
    short, enough = estimate(values[:99]), estimate(values)
    assert short is not None
    assert enough is not None
    assert short.p99 is None
    assert enough.p99 == pytest.approx(98.01)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(100):
        found = estimate(rng.lognormal(mean=0.0, sigma=0.5, size=25).tolist())
        assert found is not None
        assert found.ci95 is not None
        hits += found.ci95[0] <= 1.0 <= found.ci95[1]
    assert 88 <= hits <= 100


def test_pairing_takes_out_what_slows_both() -> None:
    load = np.array([1.0, 1.5, 3.0, 1.2, 2.0, 5.0, 1.1])
    cold, warm = (load * 100).tolist(), (load * 10).tolist()
    paired, unpaired = paired_ratio(cold, warm), unpaired_ratio(cold, warm)
    assert paired is not None
    assert unpaired is not None
    assert paired.ratio == unpaired.ratio == pytest.approx(10)
    assert paired.ci95 == pytest.approx((10, 10))
    assert unpaired.ci95 is not None
    assert unpaired.ci95[1] - unpaired.ci95[0] > 1


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="2 numerators for 1"):
        paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("ci95", "said"),
    [
        ((1.06, 1.2), Verdict.SLOWER),
        ((0.8, 0.94), Verdict.FASTER),
        ((0.98, 1.03), Verdict.SAME),
        ((0.98, 1.2), Verdict.UNCLEAR),
        (None, Verdict.TOO_FEW),
    ],
)
def test_a_verdict_needs_the_whole_interval(ci95: tuple[float, float] | None, said: Verdict) -> None:
    assert verdict(Ratio(n=5, ratio=1.0, ci95=ci95), 0.05) == said
