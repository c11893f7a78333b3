"""What is guessed from a context, and how much of it a sequence can afford."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from warmkv_server.engine.steps.speculate import ALLOWANCE, LEAST_MATCH, MOST_MATCH, START, Lookup, Purse


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8))
def test_a_guess_is_what_followed_the_longest_repetition(tokens: list[int], count: int) -> None:
    lookup = Lookup(tokens[:1], 40)
    lookup.extend(tokens[1:])

    def matched(end: int) -> int:
        """Tokens up to `end` that are the context's last."""
        length = 0
        while length < min(MOST_MATCH, end) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        return length

    best = max(range(1, len(tokens)), key=lambda end: (matched(end), end), default=0)
    if not best or matched(best) < LEAST_MATCH:
        assert lookup.guess(count) == []
    else:
        expected = list(tokens)
        for _ in range(count):
            expected.append(expected[best + len(expected) - len(tokens)])
        assert lookup.guess(count) == expected[len(tokens) :]


def test_what_guessing_loses_is_bounded_whatever_is_guessed() -> None:
    check, row, steps, lost = 0.3, 0.15, 5000, 0.0
    purse = Purse()
    for _ in range(steps):
        purse.earn(ALLOWANCE)
        if tried := purse.affords(check, row):
            cost = check + tried * row
            lost += cost
            purse.earn(-cost)
    assert ALLOWANCE * steps / 2 < lost <= START + ALLOWANCE * steps + 1e-6
