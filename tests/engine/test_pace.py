"""Prefill chunks shrink to what decoders can wait for, and only for them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmkv_server.engine.steps.prefill import Pace


def learned(pace: Pace, seconds_a_token: float, seconds_a_prefix_token: float = 0.0) -> Pace:
    """After a few chunks on a machine with these costs."""
    for prefix in range(0, 20 * pace.chunk, pace.chunk):
        pace.record(pace.chunk, prefix, pace.chunk * (seconds_a_token + seconds_a_prefix_token * prefix))
    return pace


@given(seconds=st.floats(1e-6, 1.0), prefix=st.integers(0, 100_000))
def test_nobody_waiting_means_whole_chunks(seconds: float, prefix: int) -> None:
    assert learned(Pace(256, gap=0.1), seconds).tokens(prefix, decoding=False) == 256


def test_before_anything_is_known_chunks_are_whole() -> None:
    assert Pace(256, gap=0.1).tokens(1000, decoding=True) == 256


@pytest.mark.parametrize(
    ("seconds_a_token", "tokens"), [(0.1 / 256 * 0.8, 256), (0.1 / 256 * 1.01, 128), (0.1 / 40, 32), (1.0, 16)]
)
def test_the_chunk_is_halved_until_it_fits(seconds_a_token: float, tokens: int) -> None:
    assert learned(Pace(256, gap=0.1), seconds_a_token).tokens(0, decoding=True) == tokens


def test_what_short_chunks_take_is_no_reason_to_cut_long_ones() -> None:
    """On a device where reading the weights takes as long as 256 tokens do."""
    pace = Pace(2048, gap=0.2, smallest=256)
    for _ in range(20):
        pace.record(31, 1000, 0.015)
    assert pace.predict(31, 1000) == pytest.approx(pace.predict(256, 1000))
    assert pace.tokens(1000, decoding=True) == 2048
    for _ in range(40):
        pace.record(31, 1000, 0.5)
    assert pace.tokens(1000, decoding=True) == 256


def test_a_long_prefix_makes_chunks_smaller() -> None:
    pace = learned(Pace(256, gap=0.1), 1e-4, 1e-8)
    sizes = [pace.tokens(prefix, decoding=True) for prefix in (0, 20_000, 60_000, 200_000)]
    assert sizes == [256, 256, 64, 32]
    for prefix in (100, 5_000, 80_000):
        assert pace.predict(64, prefix) == pytest.approx(64 * (1e-4 + 1e-8 * prefix), rel=1e-3)


def test_of_chunks_that_take_now_more_and_now_less_only_the_odd_one_is_late() -> None:
    pace, dice, late = Pace(256, gap=0.1), random.Random(0), 0
    for prefix in range(0, 3000 * 64, 64):
        tokens = pace.tokens(prefix, decoding=True)
        seconds = tokens * 1e-3 * dice.uniform(0.7, 1.6)
        late += prefix >= 1000 * 64 and seconds > pace.gap
        pace.record(tokens, prefix, seconds)
    assert late <= 2000 * 0.02
    assert tokens >= 32


def test_what_a_machine_did_lately_counts_more() -> None:
    pace = learned(learned(Pace(256, gap=0.1), 1e-5), 1e-2)
    assert pace.predict(20, 1000) == pytest.approx(0.2, rel=0.25)
    pace = learned(pace, 1e-5)
    assert pace.predict(20, 1000) < 0.04


@given(st.lists(st.tuples(st.integers(1, 2048), st.integers(0, 10**6), st.floats(0, 100)), max_size=20))
def test_no_history_gives_a_negative_time_or_no_chunk(chunks: list[tuple[int, int, float]]) -> None:
    pace = Pace(256, gap=0.1)
    for tokens, prefix, seconds in chunks:
        pace.record(tokens, prefix, seconds)
    assert pace.predict(256, 5000) >= 0
    assert pace.smallest <= pace.tokens(5000, decoding=True) <= 256
