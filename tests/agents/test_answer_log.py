"""Readers of any speed see the whole answer, and what they have yet to read costs little."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmkv_server.agents.answer_log import JOIN_BEHIND, JOINED, AnswerEvents, AnswerLog, AnswerReader
from warmkv_server.agents.types import CacheReport, GenerateEvent, GenerateStarted, PrefillProgress
from warmkv_server.contract.generation import Delta, Logprobs
from warmkv_server.contract.kv import Reuse

STARTED = GenerateStarted("a", CacheReport.of(Reuse(), 10))


def delta(number: int, top: int = 0) -> Delta:
    likely = tuple((number + n, -float(n) / 3) for n in range(top))
    return Delta((number,), "é𝄞 ab"[: number % 6], (Logprobs(number, -1 / (number + 1), likely),) if top else ())


def joined(deltas: list[Delta]) -> Delta:
    return Delta(
        tuple(token for each in deltas for token in each.token_ids),
        "".join(each.text for each in deltas),
        tuple(each for one in deltas for each in one.logprobs),
    )


def rest(reader: AnswerReader) -> list[GenerateEvent]:
    found: list[GenerateEvent] = []
    while event := reader.next():
        found += event
    return found


def deltas_of(events: list[GenerateEvent]) -> list[Delta]:
    return [event for event in events if isinstance(event, Delta)]


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.text(max_size=3)), max_size=3), max_size=8), st.data())
def test_any_run_of_deltas_is_what_they_are_joined(given: list[list[tuple[int, str]]], data: st.DataObject) -> None:
    deltas = [Delta(tuple(token for token, _ in each), "".join(text for _, text in each)) for each in given]
    log = AnswerLog()
    for each in deltas:
        log.add(each)
    last = data.draw(st.integers(0, len(deltas)))
    first = data.draw(st.integers(0, last))
    assert log.cut(first, last) == joined(deltas[first:last])


@pytest.mark.parametrize("top", [0, 1, 5])
def test_a_reader_that_keeps_up_gets_each_delta_and_one_that_does_not_gets_them_joined(top: int) -> None:
    events = AnswerEvents(keep=True)
    fast, slow = events.reader(), events.reader()
    events.add(STARTED)
    events.add(PrefillProgress(1, 3))
    assert rest(fast) == [STARTED, PrefillProgress(1, 3)]
    events.add(PrefillProgress(2, 3))
    events.add(PrefillProgress(3, 3))
    assert rest(fast) == [PrefillProgress(3, 3)]
    deltas = [delta(number, top) for number in range(3000)]
    for each in deltas:
        events.add(each)
        assert rest(fast) == [each]
    got = rest(slow)
    assert got[0] == STARTED
    read = deltas_of(got)
    assert joined(read) == joined(deltas)
    assert len(read) <= 3 + JOIN_BEHIND
    assert max(len(each.token_ids) for each in read) <= JOINED
    assert joined(deltas_of(rest(events.reader()))) == joined(deltas)  # one that joins now


def test_what_everybody_has_read_is_dropped_where_nobody_can_join() -> None:
    events = AnswerEvents(keep=False)
    readers = [events.reader(), events.reader()]
    deltas = [delta(number, 2) for number in range(900)]
    got: list[Delta] = []
    for number, each in enumerate(deltas):
        events.add(each)
        rest(readers[0])
        if number % 100 == 99:
            got += deltas_of(rest(readers[1]))
            with pytest.raises(AssertionError):
                events.answer.cut(0, 1)
    assert joined(got) == joined(deltas)


@pytest.mark.parametrize("top", [0, 20])
def test_an_unread_token_costs_few_bytes(top: int) -> None:
    events = AnswerEvents(keep=False)
    readers = [events.reader() for _ in range(50)]
    tokens = 5000
    tracemalloc.start()
    for number in range(tokens):
        events.add(delta(number, top))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held <= tokens * (100 + 24 * top)
    assert len(readers) == 50
