"""A run outlives its watchers, and ends the way it was told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from warmkv_server.agents.run import Run
from warmkv_server.agents.types import Activity, Doing
from warmkv_server.errors import AgentDeleted, EmptyContent, EngineError, RequestCancelled

Work = Callable[[Run[int]], Awaitable[None]]


def begun(work: Work) -> Run[int]:
    run: Run[int] = Run("test")
    run.start(work)
    return run


async def seen(run: Run[int]) -> list[int]:
    with run.watch() as watch:
        return [event async for event in watch]


async def test_every_watcher_sees_every_event_however_late_it_joins() -> None:
    go_on = asyncio.Event()

    async def work(run: Run[int]) -> None:
        run.publish(1)
        await go_on.wait()
        run.publish(2)

    run = begun(work)
    early = asyncio.create_task(seen(run))
    await asyncio.sleep(0)
    late = asyncio.create_task(seen(run))
    await asyncio.sleep(0)
    go_on.set()
    assert await early == await late == [1, 2]
    assert await seen(run) == [1, 2]


async def test_an_event_may_be_none() -> None:
    async def work(run: Run[None]) -> None:
        run.publish(None)

    run: Run[None] = Run("test")
    run.start(work)
    assert await run.result() is None  # type: ignore[func-returns-value]


async def test_result_is_the_last_event() -> None:
    async def work(run: Run[int]) -> None:
        run.publish(1)
        run.publish(2)

    assert await begun(work).result() == 2


async def test_watchers_get_the_error_behind_the_events() -> None:
    async def work(run: Run[int]) -> None:
        run.publish(1)
        raise EmptyContent("nothing there")

    run = begun(work)
    with run.watch() as watch:
        assert await anext(watch) == 1
        with pytest.raises(EmptyContent):
            await anext(watch)


async def test_what_was_not_foreseen_becomes_an_error_with_an_id_that_the_log_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(_: Run[int]) -> None:
        raise ZeroDivisionError("secret internals")

    with pytest.raises(EngineError) as caught:
        await begun(work).result()
    assert "secret" not in str(caught.value)
    assert caught.value.error_id in caplog.text
    assert "secret internals" in caplog.text


async def test_the_last_watcher_that_leaves_stops_it() -> None:
    async def work(_: Run[int]) -> None:
        await asyncio.Event().wait()

    run = begun(work)
    with run.watch():
        with run.watch():
            pass
        assert run.stopped is None
    await run.over.wait()
    assert isinstance(run.error, RequestCancelled)


async def test_it_can_be_stopped_before_its_first_step() -> None:
    async def work(_: Run[int]) -> None:
        raise AssertionError("must not begin")

    run = begun(work)
    run.stop(AgentDeleted("gone"))
    await run.over.wait()
    assert isinstance(run.error, AgentDeleted)


async def test_a_commit_is_not_interrupted() -> None:
    committing, written = asyncio.Event(), asyncio.Event()

    async def work(run: Run[int]) -> None:
        with run.uninterrupted():
            committing.set()
            await written.wait()
        run.publish(1)

    run = begun(work)
    await committing.wait()
    run.stop(RequestCancelled("client gone"))
    written.set()
    await run.over.wait()
    assert await seen(run) == [1]
    assert run.error is None


async def test_stop_asks_what_is_at_work_to_end_and_lets_it_finish() -> None:
    asked, at_work = asyncio.Event(), asyncio.Event()

    async def work(run: Run[int]) -> None:
        with run.interrupted_by(asked.set):
            at_work.set()
            await asked.wait()
        run.publish(1)
        run.check()

    run = begun(work)
    await at_work.wait()
    run.stop(RequestCancelled("client gone"))
    run.stop(AgentDeleted("too late: the first reason counts"))
    await run.over.wait()
    with run.watch() as watch:
        assert await anext(watch) == 1
    assert isinstance(run.error, RequestCancelled)


async def test_progress_is_told_when_it_changes_and_otherwise_so_often() -> None:
    go_on, begin = asyncio.Event(), asyncio.Event()

    async def work(run: Run[int]) -> None:
        await begin.wait()
        for done in range(3):
            run.doing = Doing(Activity.PREFILLING, done, 3)
            await asyncio.sleep(0)
        await go_on.wait()
        run.publish(1)

    run = begun(work)
    told: list[Doing] = []
    with run.watch() as watch:
        async for doing in watch.progress(0.001):
            told.append(doing)
            if told.count(Doing(Activity.QUEUED)) == 3:
                begin.set()
            if told.count(Doing(Activity.PREFILLING, 2, 3)) == 3:
                go_on.set()
        assert await watch.last() == 1
    changes = [each for number, each in enumerate(told) if each not in told[:number]]
    assert changes == [Doing(Activity.QUEUED), *(Doing(Activity.PREFILLING, done, 3) for done in range(3))]
    assert [doing async for doing in run.watch().progress(0.001)] == []  # what is over has none


async def test_who_reads_progress_slowly_gets_the_latest() -> None:
    async def work(run: Run[int]) -> None:
        for done in range(100):
            run.doing = Doing(Activity.PREFILLING, done, 100)
            await asyncio.sleep(0)

    run = begun(work)
    told: list[Doing] = []
    with run.watch() as watch:
        async for doing in watch.progress(60):
            told.append(doing)
            await run.over.wait()
    assert len(told) == 1


async def test_progress_ends_with_a_run_that_fails() -> None:
    async def work(_: Run[int]) -> None:
        raise EmptyContent("nothing")

    run = begun(work)
    with run.watch() as watch:
        assert [doing async for doing in watch.progress(60)] == [Doing(Activity.QUEUED)]
        with pytest.raises(EmptyContent):
            await watch.last()
