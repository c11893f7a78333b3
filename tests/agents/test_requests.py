"""A request id makes a retry do nothing twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from warmkv_server.agents.idempotency import Requests, ResponseCodec
from warmkv_server.agents.run import Run
from warmkv_server.agents.types import Identity, Recorded
from warmkv_server.contract.names import AgentKey
from warmkv_server.errors import OutcomeUnreadable, RequestCancelled, RequestIdReused
from warmkv_server.kv.store import RequestOutcome

KEY = AgentKey("", "a")
IDENTITY = Identity("retry-me", b"body")


def _decode(content: bytes) -> Recorded:
    return Recorded(int(content))


CODEC: ResponseCodec[Any] = ResponseCodec(lambda value: [str(value).encode()], _decode)


class Scene:
    """Requests over a dictionary, and work that ends when it is told to.

    Attributes:
        look: while it is clear, whoever looks for what was kept waits.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], RequestOutcome] = {}
        self.requests = Requests(self._find)
        self.begun = 0
        self.commit = asyncio.Event()
        self.look = asyncio.Event()
        self.look.set()

    async def _find(self, tenant: str, request_id: str) -> RequestOutcome | None:
        await self.look.wait()
        return self.kept.get((tenant, request_id))

    async def send(self, identity: Identity | None = IDENTITY, key: AgentKey = KEY) -> Run[Any]:
        return await self.requests.run_once(key, identity, CODEC, lambda: self._begin(identity, key))

    def _begin(self, identity: Identity | None, key: AgentKey) -> Run[Any]:
        self.begun += 1
        number = self.begun

        async def work(run: Run[Any]) -> None:
            with run.interrupted_by(self.commit.set):
                await self.commit.wait()
            if identity is not None:
                self.kept[key.tenant, identity.request_id] = CODEC.outcome(identity, [number])
            run.check()
            run.publish(number)

        run: Run[Any] = Run("test")
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
    assert await (await scene.send()).result() == Recorded(1)
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

    def fail() -> Run[Any]:
        async def work(_: Run[Any]) -> None:
            raise RequestCancelled("before the commit")

        run: Run[Any] = Run("test")
        run.start(work)
        return run

    failed = await scene.requests.run_once(KEY, IDENTITY, CODEC, fail)
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
    assert await again.result() == Recorded(1)
    assert scene.begun == 1


async def test_those_that_come_while_one_looks_join_what_it_begins() -> None:
    scene = Scene()
    scene.look.clear()
    sent = [asyncio.create_task(scene.send()) for _ in range(3)]
    await asyncio.sleep(0)
    scene.look.set()
    first, *others = await asyncio.gather(*sent)
    assert all(other is first for other in others)
    assert scene.begun == 1
    scene.commit.set()
    await first.result()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_all_events_are_kept(cancelled: bool) -> None:
    run = CODEC.replay(CODEC.outcome(IDENTITY, [1, 22, 333], cancelled=cancelled))
    with run.watch() as watch:
        assert [await anext(watch) for _ in range(3)] == [Recorded(1), Recorded(22), Recorded(333)]
    assert isinstance(run.error, RequestCancelled) is cancelled


KEPT = CODEC.outcome(IDENTITY, [12345]).payload


@pytest.mark.parametrize(
    "payload",
    [b'{"agent":{"record":{"tenant":"","agent_id":"a"}}}', b"\x02" + KEPT[1:], KEPT[:-1], KEPT[:4], b"", KEPT + b"x"],
    ids=["the format before", "a later one", "cut short", "cut shorter", "nothing", "a rest"],
)
async def test_what_another_version_kept_is_not_done_again(payload: bytes) -> None:
    scene = Scene()
    scene.kept["", "retry-me"] = RequestOutcome("retry-me", IDENTITY.body_hash, payload)
    with pytest.raises(OutcomeUnreadable):
        await scene.send()
    with pytest.raises(RequestIdReused):
        await scene.send(Identity("retry-me", b"other body"))
    assert scene.begun == 0
