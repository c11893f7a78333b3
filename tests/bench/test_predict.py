"""The prediction of run times."""

from __future__ import annotations

import pytest

from warmkv_bench.config import Isolation, Mode, State
from warmkv_bench.plan import Round
from warmkv_bench.predict import PREFILL, PRIME, TimeModel, fit


def prefill_s(tokens: int) -> float:
    return 2e-4 * tokens + 3e-8 * tokens**2


def test_a_fit_finds_the_curve_it_was_made_from() -> None:
    curve = fit([(1024, prefill_s(1024)), (4096, prefill_s(4096))], (1, 2))
    assert curve.linear == pytest.approx(2e-4)
    assert curve.quadratic == pytest.approx(3e-8)
    assert curve.at(32768) == pytest.approx(prefill_s(32768))


def test_small_and_large_sizes_count_alike() -> None:
    noisy = [(1024, prefill_s(1024) * 1.1), (8192, prefill_s(8192) * 0.9), (32768, prefill_s(32768))]
    curve = fit(noisy, (1, 2))
    for tokens, _ in noisy:
        assert curve.at(tokens) == pytest.approx(prefill_s(tokens), rel=0.2)


def test_no_part_of_a_curve_is_negative() -> None:
    # Faster for each token at the larger size: a plain fit would make the quadratic part negative.
    curve = fit([(1000, 1.0), (4000, 2.0)], (1, 2))
    assert curve.quadratic == 0
    assert curve.linear > 0


def test_one_size_is_extrapolated_as_a_line() -> None:
    assert fit([(1000, 1.0)], (1, 2)).at(4000) == pytest.approx(4.0)


def test_a_fit_needs_points() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fit([], (1, 2))


def model() -> TimeModel:
    seen = TimeModel()
    for tokens in (1000, 4000):
        seen.observe(PREFILL, 1, tokens, prefill_s(tokens))
        seen.observe(State.COLD, 1, tokens, 0.5)
        seen.observe(PRIME, 1, tokens, 0.1)
        seen.observe(State.WARM, 1, tokens, 0.5 + tokens * 1e-4)
    return seen


def of(states: tuple[State, ...], isolation: Isolation, batch: int = 1) -> Round:
    return Round(16000, Mode.STREAMING, batch, 1, states, isolation)


def test_a_cold_sample_pays_for_the_prime_of_forks() -> None:
    both = model().predict(of((State.COLD, State.WARM), Isolation.FORK), 16000)
    assert both == pytest.approx(prefill_s(16000) + 0.5 + 0.1 + 2.1)
    alone = model().predict(of((State.WARM,), Isolation.FORK), 16000)
    assert alone == pytest.approx(prefill_s(16000) + 0.1 + 2.1)


def test_strict_isolation_pays_for_every_state() -> None:
    found = model().predict(of((State.COLD, State.WARM), Isolation.STRICT), 16000)
    assert found == pytest.approx(2 * prefill_s(16000) + 0.5 + 0.1 + 2.1)


def test_batches_are_sequential_until_one_was_seen() -> None:
    seen = model()
    warm = of((State.COLD,), Isolation.FORK, batch=2)
    assert seen.predict(warm, 16000) == pytest.approx(2 * (prefill_s(16000) + 0.5))
    seen.observe(PREFILL, 2, 1000, prefill_s(1000) * 1.5)
    seen.observe(State.COLD, 2, 1000, 0.6)
    assert seen.predict(warm, 16000) == pytest.approx(1.5 * prefill_s(16000) + 0.6)
