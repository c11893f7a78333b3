"""Decoding with guesses beside decoding without."""

from __future__ import annotations

import pytest

from tests.bench.scripted import ScriptedServer, serving
from warmkv_bench.client import Client
from warmkv_bench.prompts import Prompts
from warmkv_bench.speculate import PASSAGE, Case, Pair, measure, pairs_table, prompt_of

PROMPTS = Prompts(range(300, 1300), seed=0)


def test_prompts_repeat_themselves_or_do_not() -> None:
    repetitive = prompt_of(Case.REPETITIVE, PROMPTS, 1, 500)
    assert len(repetitive) == 500
    assert repetitive[PASSAGE:] == repetitive[:-PASSAGE]
    plain = prompt_of(Case.PLAIN, PROMPTS, 1, 500)
    assert len(plain) == 500
    assert len(set(zip(plain, plain[1:], plain[2:], strict=False))) == 498


async def test_both_servers_are_asked_the_same() -> None:
    async with (
        serving(ScriptedServer()) as one,
        serving(ScriptedServer()) as two,
        Client(one, 120.0) as plain,
        Client(two, 120.0) as guessing,
    ):
        pairs = await measure(plain, guessing, PROMPTS, 2 * PASSAGE, 6, 2)
        asked = [(await client.stats()).counters.prefilled_tokens for client in (plain, guessing)]
    assert [(pair.case, pair.run) for pair in pairs] == [(case, run) for run in (0, 1) for case in Case]
    assert asked == [9 * 2 * PASSAGE] * 2, "two runs and a warm-up, three cases"
    assert all(pair.plain_per_s > 0 and pair.speculating_per_s > 0 for pair in pairs)
    assert all(pair.same_tokens == 6 for pair in pairs)


@pytest.mark.parametrize(("same", "shown"), [(8, "1 of 1"), (7, "0 of 1")])
def test_the_table_says_where_answers_differ(same: int, shown: str) -> None:
    table = pairs_table([Pair(Case.PLAIN, 0, 10.0, 25.0, same)], 8)
    assert table.rows == [("plain", "10.0", "25.0", "2.50", "2.50", shown)]
