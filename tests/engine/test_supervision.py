"""What breaks the loop itself ends what is in flight, with an id that the log has; then the engine goes on, once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.conftest import FolderOf
from tests.engine.runs import Solo, become, begun, check_greedy, job_of, outcome, prompt_of, running
from warmkv_server.engine.engine import Handle
from warmkv_server.engine.model.memory_need import MemoryNeeds
from warmkv_server.engine.output.sampling import Chooser
from warmkv_server.engine.steps import loop
from warmkv_server.engine.steps.decode import Decoder
from warmkv_server.engine.steps.delivery import Delivery
from warmkv_server.engine.steps.prefill import Prefiller
from warmkv_server.engine.steps.schedule import Schedule
from warmkv_server.errors import EngineError


class Planted(BaseException):
    """Nothing that anybody foresees."""


class Mine:
    """Goes off at its nth call from when it is armed, once."""

    def __init__(self) -> None:
        self.left = 0

    def arm(self, calls: int = 1) -> None:
        self.left = calls

    def around(self, work: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.left:
                self.left -= 1
                if not self.left:
                    raise error
            return work(*args, **options)

        return call


@pytest.fixture
def mine() -> Mine:
    return Mine()


async def ids_of(*handles: Handle) -> set[str]:
    found = set()
    for handle in handles:
        with pytest.raises(EngineError) as caught:
            await asyncio.wait_for(outcome(handle), 60)
        found.add(caught.value.error_id)
    return found


PLACES = {
    "scheduling": (Schedule, "pick", ZeroDivisionError()),
    "admission": (Schedule, "admit", ZeroDivisionError()),
    "order": (Prefiller, "lets_decode", ZeroDivisionError()),
    "decoding": (Decoder, "step", ZeroDivisionError()),
    "delivery": (Delivery, "send", ZeroDivisionError()),
    "sampling": (Chooser, "choose", Planted()),
}


@pytest.mark.parametrize("place", PLACES)
async def test_it_ends_what_is_in_flight_and_begins_anew(
    place: str, mine: Mine, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    where, name, error = PLACES[place]
    monkeypatch.setattr(where, name, mine.around(getattr(where, name), error))
    solo = Solo(folder_of("llama"))
    said: list[bool] = []
    async with running(folder_of("llama"), max_batch=3, tell=said.append) as engine:
        await outcome(engine.submit(job_of(prompt_of(10), 5)))
        counted = engine.stats()
        handles = [await begun(engine.submit(job_of(prompt_of(40 + n), 3000, top_logprobs=1))) for n in range(2)]
        handles += [engine.submit(job_of(prompt_of(500), 5)) for _ in range(3)]
        mine.arm()
        if place == "admission":
            handles.pop(2).cancel()  # then there is room
        (error_id,) = await ids_of(*handles)
        (record,) = [record for record in caplog.records if error_id in record.getMessage()]
        assert (record.levelno, record.exc_info is not None) == (logging.ERROR, True)
        for n in range(3):
            got = await asyncio.wait_for(outcome(engine.submit(job_of(prompt_of(60 + n), 5))), 60)
            check_greedy(got.tokens, solo.answer(prompt_of(60 + n), 5))
        assert said == [False, True]
        stats = engine.stats()
        assert (stats.queue_depth, stats.prefilling, stats.decoding, stats.in_flight_bytes) == (0, 0, 0, 0)
        assert stats.decoded_tokens >= counted.decoded_tokens + 15
        assert not engine.lost.done()


async def test_a_second_failure_soon_is_the_last(
    mine: Mine, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Schedule, "pick", mine.around(Schedule.pick, ZeroDivisionError()))
    said: list[bool] = []
    async with running(folder_of("llama"), tell=said.append) as engine:
        for _ in range(2):
            handle = await begun(engine.submit(job_of(prompt_of(40), 3000)))
            mine.arm()
            (error_id,) = await ids_of(handle)
        assert await asyncio.wait_for(engine.lost, 60) == error_id
        assert said == [False, True, False]
        with pytest.raises(EngineError, match=error_id):
            engine.submit(job_of(prompt_of(40), 5))


async def test_a_second_failure_much_later_is_a_first_one(
    mine: Mine, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SOON_SECONDS", 0.0)
    monkeypatch.setattr(Schedule, "pick", mine.around(Schedule.pick, ZeroDivisionError()))
    async with running(folder_of("llama"), speculate_tokens=3) as engine:
        for _ in range(3):
            handle = await begun(engine.submit(job_of(prompt_of(40), 3000)))
            mine.arm()
            await ids_of(handle)
        assert len((await outcome(engine.submit(job_of(prompt_of(40), 5)))).tokens) == 5


async def test_a_job_that_cannot_be_taken_ends_alone(
    mine: Mine, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(MemoryNeeds, "of_job", mine.around(MemoryNeeds.of_job, ZeroDivisionError()))
    async with running(folder_of("llama")) as engine:
        beside = await begun(engine.submit(job_of(prompt_of(40), 60)))
        mine.arm()
        (error_id,) = await ids_of(engine.submit(job_of(prompt_of(41), 5)))
        assert error_id in caplog.text
        assert len((await outcome(beside)).finished.completion) == 60


async def test_an_event_that_cannot_be_delivered_ends_its_own_job(
    mine: Mine, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Handle, "push", mine.around(Handle.push, ZeroDivisionError()))
    async with running(folder_of("llama")) as engine:
        handles = [await begun(engine.submit(job_of(prompt_of(40 + n), 300))) for n in range(2)]
        mine.arm()
        ended = await asyncio.gather(*(outcome(handle) for handle in handles), return_exceptions=True)
        (error,) = [each for each in ended if isinstance(each, EngineError)]
        assert error.error_id in caplog.text
        (other,) = [each for each in ended if each is not error]
        assert not isinstance(other, BaseException)
        assert len(other.finished.completion) == 300
        assert len((await outcome(engine.submit(job_of(prompt_of(42), 5)))).tokens) == 5


async def test_what_the_model_raises_that_is_no_exception(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library that calls `sys.exit`."""

    def subclass(real: type[Any]) -> type[Any]:
        def call(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            if inputs.shape[1] == 7:
                raise SystemExit(3)
            return real.__call__(model, inputs, *rest, **options)

        return type("Quitting", (real,), {"__call__": call})

    become(monkeypatch, subclass)
    async with running(folder_of("llama")) as engine:
        beside = await begun(engine.submit(job_of(prompt_of(41), 3000)))
        await ids_of(engine.submit(job_of(prompt_of(8), 5)), beside)
        assert len((await outcome(engine.submit(job_of(prompt_of(9), 5)))).tokens) == 5
