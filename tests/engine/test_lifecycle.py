"""Sequences come, wait, run, are cancelled and go, and none holds up another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.engine.conftest import FolderOf
from tests.engine.runs import (
    CHUNK,
    Outcome,
    Solo,
    after,
    check_greedy,
    check_growth,
    job_of,
    outcome,
    prompt_of,
    running,
)
from tests.engine.spans import grown, needed
from warmkv_server.contract.generation import Answer, Delta, Event, Finish, Finished, Job, Progress, Started
from warmkv_server.engine.engine import Engine, Handle

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = 1500
"""Tokens of a prompt that takes many chunks."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder_of: FolderOf) -> AsyncIterator[Engine]:
    async with running(folder_of("llama")) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow(folder_of: FolderOf) -> AsyncIterator[Engine]:
    """It runs one sequence at a time."""
    async with running(folder_of("llama"), max_batch=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def solo(folder_of: FolderOf) -> Solo:
    return Solo(folder_of("llama"))


async def until(handle: Handle, kind: type[Event], count: int = 1) -> Outcome:
    """Read up to the so many-th event of a kind; the rest can still be read."""
    got = Outcome()
    events = aiter(handle)
    while sum(isinstance(event, kind) for event in got.events) < count:
        got.events.append(await anext(events))
    return got


async def test_phases_and_progress_of_a_handle(engine: Engine) -> None:
    handle = engine.submit(job_of(prompt_of(100), 5))
    assert handle.phase == "queued"
    phases: list[str] = []
    done: list[int] = []
    async for event in handle:
        phases.append(handle.phase)
        if isinstance(event, Progress):
            assert event.total == 100
            done.append(event.done)
    assert phases == sorted(phases, key=["prefilling", "decoding", "done"].index)
    assert phases[-1] == "done"
    assert done == sorted(set(done))
    assert done[-1] == 100


async def test_a_job_cancelled_in_the_queue_never_starts(narrow: Engine) -> None:
    first, second = narrow.submit(job_of(prompt_of(LONG), 3)), narrow.submit(job_of(prompt_of(20), 3))
    await until(first, Started)
    second.cancel()
    got = await outcome(second)
    assert [type(event) for event in got.events] == [Finished]
    assert (got.finished.finish, got.finished.completion) == (Finish.CANCELLED, ())
    check_growth(got.finished.growth, 0, 0)
    assert first.phase == "prefilling"
    assert (await outcome(first)).finished.finish is Finish.LENGTH


async def test_a_job_with_a_reused_prefix_cancelled_in_the_queue_has_grown_nothing(narrow: Engine) -> None:
    spans = grown([(await outcome(narrow.submit(Job(prompt_of(20))))).finished.growth], 20)
    first = narrow.submit(job_of(prompt_of(LONG), 3))
    second = narrow.submit(after(prompt_of(30), spans, 20, Answer(max_tokens=3)))
    second.cancel()
    check_growth((await outcome(second)).finished.growth, 20, 20)
    first.cancel()
    await outcome(first)


async def test_a_prefill_stops_within_a_chunk_and_what_it_computed_is_good(engine: Engine, solo: Solo) -> None:
    prompt = prompt_of(LONG)
    handle = engine.submit(job_of(prompt, 3))
    last = (await until(handle, Progress, count=3)).events[-1]
    assert isinstance(last, Progress)
    handle.cancel()
    seen, prefilled = last.done, engine.stats().prefilled_tokens
    got = await outcome(handle)
    assert engine.stats().prefilled_tokens - prefilled <= CHUNK, "only the chunk under way may still be computed"
    finished = got.finished
    assert (finished.finish, finished.completion) == (Finish.CANCELLED, ())
    computed = finished.growth.end
    assert 0 < seen <= computed < LONG
    assert computed % CHUNK == 0
    check_growth(finished.growth, 0, computed)

    tokens = prompt[: computed + 9]
    spans = needed(grown([finished.growth], computed), engine.info.layout, computed)
    resumed = await outcome(engine.submit(after(tokens, spans, computed, Answer(max_tokens=5, ignore_eos=True))))
    check_greedy(resumed.tokens, solo.answer(tokens, 5))


async def test_a_prefill_behind_a_long_prefix_stops_within_a_chunk(engine: Engine) -> None:
    """Also where the chunk itself is the smaller part of a step."""
    prompt = prompt_of(2 * LONG)
    spans = grown([(await outcome(engine.submit(Job(prompt[:LONG])))).finished.growth], LONG)
    handle = engine.submit(after(prompt, spans, LONG, Answer(max_tokens=3)))
    await until(handle, Progress, count=3)
    handle.cancel()
    prefilled = engine.stats().prefilled_tokens
    finished = (await outcome(handle)).finished
    assert engine.stats().prefilled_tokens - prefilled <= CHUNK
    assert finished.finish is Finish.CANCELLED
    assert LONG < finished.growth.end < 2 * LONG
    check_growth(finished.growth, LONG, finished.growth.end)


async def test_decoding_stops_within_a_step(engine: Engine) -> None:
    handle = engine.submit(job_of(prompt_of(20), 2000))
    await until(handle, Delta, count=4)
    handle.cancel()
    decoded = engine.stats().decoded_tokens
    got = await outcome(handle)
    assert got.finished.finish is Finish.CANCELLED
    assert len(got.finished.completion) >= 4
    assert engine.stats().decoded_tokens - decoded <= 1, "only the step under way may still give a token"
    check_growth(got.finished.growth, 0, 20 + len(got.finished.completion))


async def test_cancelling_twice_or_too_late_does_nothing(engine: Engine) -> None:
    handle = engine.submit(job_of(prompt_of(20), 2000))
    await until(handle, Delta)
    handle.cancel()
    handle.cancel()
    assert (await outcome(handle)).finished.finish is Finish.CANCELLED
    handle.cancel()
    done = engine.submit(job_of(prompt_of(20), 2))
    assert (await outcome(done)).finished.finish is Finish.LENGTH
    done.cancel()
    assert (await outcome(engine.submit(job_of(prompt_of(20), 2)))).finished.finish is Finish.LENGTH


async def test_a_cancelled_row_leaves_the_others_as_they_are(engine: Engine, solo: Solo) -> None:
    handles = [engine.submit(job_of(prompt_of(40 + n), 30)) for n in range(4)]
    await until(handles[1], Delta, count=3)
    handles[1].cancel()
    for n, handle in enumerate(handles):
        got = await outcome(handle)
        assert got.finished.finish is (Finish.CANCELLED if n == 1 else Finish.LENGTH)
        if n != 1:
            check_greedy(got.tokens, solo.answer(prompt_of(40 + n), 30))


async def test_a_long_prefill_and_a_long_answer_do_not_wait_for_each_other(engine: Engine) -> None:
    order: list[tuple[str, Event]] = []

    answers = asyncio.Event()

    async def read(name: str, handle: Handle) -> None:
        async for event in handle:
            order.append((name, event))
            if isinstance(event, Delta):
                answers.set()

    reading = [asyncio.create_task(read("answering", engine.submit(job_of(prompt_of(10), 400))))]
    await answers.wait()
    reading.append(asyncio.create_task(read("prefilling", engine.submit(job_of(prompt_of(LONG), 5)))))
    reading.append(asyncio.create_task(read("short", engine.submit(job_of(prompt_of(12), 5)))))
    await asyncio.gather(*reading)

    def first(name: str, kind: type[Event]) -> int:
        return next(n for n, (who, event) in enumerate(order) if who == name and isinstance(event, kind))

    between = order[first("prefilling", Started) : first("prefilling", Delta)]
    assert sum(name == "answering" and isinstance(event, Delta) for name, event in between) >= LONG // CHUNK // 2
    assert first("prefilling", Finished) < first("answering", Finished)
    assert first("short", Finished) < first("prefilling", Delta)


async def test_short_prompts_do_not_starve_a_long_one(engine: Engine) -> None:
    """Each of them has less left than it, always; together they have twice as much."""
    long = engine.submit(job_of(prompt_of(LONG), 1))
    short = [engine.submit(job_of(prompt_of(3 * CHUNK + 1), 1)) for _ in range(2 * LONG // (3 * CHUNK))]
    await outcome(long)
    assert any(handle.phase != "done" for handle in short)
    await asyncio.gather(*(outcome(handle) for handle in short))


async def test_long_answers_that_overlap_leave_whole_contexts(engine: Engine, solo: Solo) -> None:
    """Their words are gathered along the way, for rows that come and go in between."""
    first = engine.submit(job_of(prompt_of(40), 150))
    await until(first, Delta, count=50)
    second = engine.submit(job_of(prompt_of(90, seed=1), 100))
    for prompt, handle in ((prompt_of(90, seed=1), second), (prompt_of(40), first)):
        finished = (await outcome(handle)).finished
        tokens = [*prompt, *finished.completion]
        check_growth(finished.growth, 0, len(tokens))
        spans = grown([finished.growth], len(tokens))
        more = [*tokens, *prompt_of(4, seed=2)]
        got = await outcome(engine.submit(after(more, spans, len(tokens), Answer(max_tokens=5, ignore_eos=True))))
        check_greedy(got.tokens, solo.answer(more, 5))


async def test_waiting_jobs_run_in_order_of_arrival(narrow: Engine) -> None:
    ended: list[int] = []

    async def read(number: int, handle: Handle) -> None:
        await outcome(handle)
        ended.append(number)

    handles = [narrow.submit(job_of(prompt_of(70 - 10 * number), 3)) for number in range(6)]
    await asyncio.gather(*(read(number, handle) for number, handle in enumerate(handles)))
    assert ended == list(range(6))


async def test_a_reader_that_stops_reading_holds_up_nobody_and_loses_nothing(
    engine: Engine,
) -> None:
    answer = 60
    slow = engine.submit(job_of(prompt_of(30), answer, top_logprobs=1))
    await until(slow, Delta)
    other = await outcome(engine.submit(job_of(prompt_of(31), answer)))  # as long, and begun later
    assert len(other.tokens) == answer
    assert slow.phase == "done"
    got = await outcome(slow)
    assert len(got.finished.completion) == answer
    assert tuple(got.tokens) == got.finished.completion[1:]  # the first was read before
    assert [each.token_id for each in got.logprobs] == got.tokens
    text = (await outcome(engine.submit(job_of(prompt_of(30), answer)))).text
    assert text.endswith(got.text)
    assert len(got.text) > answer // 2


async def test_counters_count_what_was_computed(engine: Engine) -> None:
    growth = (await outcome(engine.submit(Job(prompt_of(50))))).finished.growth
    before = engine.stats()
    job = after(prompt_of(70), grown([growth], 50), 50, Answer(max_tokens=6, ignore_eos=True))
    await outcome(engine.submit(job))
    now = engine.stats()
    assert now.prefilled_tokens - before.prefilled_tokens == 20
    assert now.decoded_tokens - before.decoded_tokens == 6
    assert (now.queue_depth, now.prefilling, now.decoding, now.in_flight_bytes) == (0, 0, 0, 0)
