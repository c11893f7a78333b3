"""A request id makes a retry do nothing twice."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import TypeAdapter

from warmkv_server.agents import generate
from warmkv_server.agents.requests import Recorder, Requests
from warmkv_server.agents.run import Run
from warmkv_server.agents.types import AgentKey, CacheReport, GenerateFinished, GenerateStarted, Identity, Timings
from warmkv_server.engine.types import Delta, Finish, Logprobs
from warmkv_server.errors import RequestCancelled, RequestIdReused
from warmkv_server.kv.store import RequestOutcome
from warmkv_server.kv.types import Fallback, Source

KEY = AgentKey("", "a")
IDENTITY = Identity("retry-me", b"body")


def _replay(value: int) -> Run[int]:
    return Run.replay("again", [value])


RECORDER = Recorder(TypeAdapter(int), _replay)


class Scene:
    """Requests over a dictionary, and work that ends when it is told to."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], RequestOutcome] = {}
        self.requests = Requests(lambda tenant, request_id: self.kept.get((tenant, request_id)))
        self.begun = 0
        self.commit = asyncio.Event()

    async def send(self, identity: Identity | None = IDENTITY, key: AgentKey = KEY) -> Run[int]:
        return await self.requests.run_once(key, identity, RECORDER, lambda: self._begin(identity, key))

    def _begin(self, identity: Identity | None, key: AgentKey) -> Run[int]:
        self.begun += 1
        number = self.begun

        async def work(run: Run[int]) -> None:
            with run.interrupted_by(self.commit.set):
                await self.commit.wait()
            if identity is not None:
                self.kept[key.tenant, identity.request_id] = RECORDER.outcome(identity, number)
            run.check()
            run.publish(number)

        run: Run[int] = Run("test")
        run.start(work)
        return run


async def test_one_that_runs_is_joined() -> None:
    scene = Scene()
    first, second = await scene.send(), await scene.send()
    assert first is second
    scene.commit.set()
    assert await first.result() == await second.result() == 1
    assert scene.begun == 1


async def test_one_that_is_over_is_replayed() -> None:
    scene = Scene()
    scene.commit.set()
    assert await (await scene.send()).result() == 1
    assert await (await scene.send()).result() == 1
    assert scene.begun == 1


async def test_without_an_id_nothing_is_joined() -> None:
    scene = Scene()
    scene.commit.set()
    assert await (await scene.send(None)).result() == 1
    assert await (await scene.send(None)).result() == 2


async def test_ids_of_tenants_are_apart() -> None:
    scene = Scene()
    scene.commit.set()
    assert await (await scene.send()).result() == 1
    assert await (await scene.send(key=AgentKey("other", "a"))).result() == 2


@pytest.mark.parametrize("running", [True, False])
async def test_another_body_is_refused(running: bool) -> None:
    scene = Scene()
    run = await scene.send()
    if not running:
        scene.commit.set()
        await run.result()
    with pytest.raises(RequestIdReused):
        await scene.send(Identity("retry-me", b"other body"))
    scene.commit.set()


async def test_what_failed_before_its_commit_is_done_again() -> None:
    scene = Scene()

    def fail() -> Run[int]:
        async def work(_: Run[int]) -> None:
            raise RequestCancelled("before the commit")

        run: Run[int] = Run("test")
        run.start(work)
        return run

    failed = await scene.requests.run_once(KEY, IDENTITY, RECORDER, fail)
    with pytest.raises(RequestCancelled):
        await failed.result()
    scene.commit.set()
    assert await (await scene.send()).result() == 1


async def test_one_that_is_being_cancelled_is_waited_for_and_then_replayed() -> None:
    scene = Scene()
    run = await scene.send()
    await asyncio.sleep(0)
    run.stop(RequestCancelled("client gone"))
    again = await scene.send()
    assert again is not run
    assert await again.result() == 1
    assert scene.begun == 1


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_generate_is_kept_to_the_last_digit(cancelled: bool) -> None:
    cache = CacheReport(Source.WARM, 10, 1, 2, 3, 4, Fallback.CHECKSUM)
    started = GenerateStarted("a", cache)
    answer = Delta((1, 2), "a b\n\x00é", (Logprobs(1, -0.1, ((1, -0.1), (7, -1e-30))), Logprobs(2, float("-inf"), ())))
    finished = GenerateFinished(
        Finish.STOP_SEQUENCE, "\n", 2, cache, Timings(0.1, 1 / 3, 1e-9), agent=None, persisted=True
    )
    kept = generate.Kept(started, answer, None if cancelled else finished)
    outcome = generate.RECORDER.outcome(IDENTITY, kept)
    run = generate.RECORDER.replay(generate.RECORDER.kept.validate_json(outcome.payload))
    expected = [started, answer] if cancelled else [started, answer, finished]
    with run.watch() as watch:
        assert [await anext(watch) for _ in expected] == expected
    assert isinstance(run.error, RequestCancelled) is cancelled
