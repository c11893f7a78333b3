"""What others see while something is on its way to the index: what is durable, and nothing that may yet be lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kv.disk import make_index_refuse
from tests.kv.driver import TENANT, Driver
from tests.kv.words import context
from warmkv_server.contract.store import AgentRecord
from warmkv_server.errors import AgentDeleted, AgentNotFound, StorageUnavailable
from warmkv_server.kv.catalog.database import Database, Statement
from warmkv_server.kv.index.records import RequestOutcome

SHORT, LONG = context(300), context(700)
WAIT_SECONDS = 60.0


class SlowIndex:
    """While it is `held`, each transaction waits before it begins."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._free.set()
        self._reached = threading.Event()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        apply = Database.apply

        def slow(database: Database, statements: Sequence[Statement], number: int | None = None) -> None:
            self._reached.set()
            assert self._free.wait(WAIT_SECONDS)
            apply(database, statements, number)

        monkeypatch.setattr(Database, "apply", slow)

    @asynccontextmanager
    async def held(self, work: Any) -> AsyncIterator[asyncio.Task[Any]]:
        """The block runs while the transaction of `work` is under way."""
        self._free.clear()
        self._reached.clear()
        task = asyncio.create_task(work)
        try:
            await asyncio.to_thread(self._reached.wait, WAIT_SECONDS)
            yield task
        finally:
            self._free.set()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> SlowIndex:
    slow = SlowIndex()
    slow.stand_in(monkeypatch)
    return slow


def seen(driver: Driver) -> list[AgentRecord]:
    return list(driver.store.agents(TENANT))


async def test_an_agent_is_there_when_its_first_commit_is_durable(tmp_path: Path, index: SlowIndex) -> None:
    driver = await Driver.open(tmp_path)
    async with index.held(driver.put("a", SHORT)) as putting:
        assert driver.store.agent(TENANT, "a") is None
        assert not seen(driver)
        with pytest.raises(AgentNotFound):
            driver.store.tokens(TENANT, "a")
        with pytest.raises(AgentNotFound):
            await driver.store.fork(TENANT, "a", "b")
        updating = asyncio.create_task(driver.store.update(TENANT, "a", labels={"k": "v"}))
        await asyncio.sleep(0)
    _, committed = await putting
    assert committed.persisted
    assert (await updating).labels == {"k": "v"}
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert [(record.revision, record.labels) for record in seen(driver)] == [(1, {"k": "v"})]
    await driver.close()


async def test_until_a_commit_is_durable_the_one_before_is_seen(tmp_path: Path, index: SlowIndex) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", SHORT)
    before = seen(driver)
    forking = None
    async with index.held(driver.put("a", LONG, pinned=True, request=RequestOutcome("r", b"", b""))) as putting:
        assert [(r.revision, r.token_count, r.pinned) for r in seen(driver)] == [(1, 300, False)]
        assert [r.hot_bytes for r in seen(driver)] == [r.hot_bytes for r in before]
        assert driver.store.tokens(TENANT, "a").tolist() == SHORT.tolist()
        assert await driver.store.outcome(TENANT, "r") is None
        forking = asyncio.create_task(driver.store.fork(TENANT, "a", "b"))
        await asyncio.sleep(0)
        assert driver.store.agent(TENANT, "b") is None
    await putting
    assert (await forking).token_count == 300
    assert [(r.revision, r.token_count, r.pinned) for r in seen(driver)] == [(2, 700, True), (1, 300, False)]
    await driver.close()


async def test_options_are_seen_when_they_are_durable(tmp_path: Path, index: SlowIndex) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", SHORT)
    before = seen(driver)
    async with index.held(driver.store.update(TENANT, "a", pinned=True, ttl=9.0, labels={"k": "v"})) as updating:
        assert seen(driver) == before
        putting = asyncio.create_task(driver.put("a", LONG))
        await asyncio.sleep(0)
    await asyncio.gather(updating, putting)
    (now,) = seen(driver)
    assert (now.pinned, now.ttl, now.labels, now.revision) == (True, 9.0, {"k": "v"}, 2)
    await driver.close()
    driver = await Driver.open(tmp_path)
    (then,) = seen(driver)
    assert (then.pinned, then.ttl, then.labels, then.revision) == (True, 9.0, {"k": "v"}, 2)
    await driver.close()


async def test_a_commit_the_index_refuses_is_seen_once_it_is_acknowledged_as_not_durable(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, retry_seconds=3600.0)
    make_index_refuse(driver, True)
    _, committed = await driver.put("a", SHORT)
    assert not committed.persisted
    assert [record.durable for record in seen(driver)] == [False]
    with pytest.raises(StorageUnavailable, match="RAM only"):
        await driver.store.update(TENANT, "a", pinned=True)
    make_index_refuse(driver, False)
    await driver.close()


async def test_a_delete_that_fails_leaves_a_commit_in_flight_alone(tmp_path: Path, index: SlowIndex) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", SHORT)
    make_index_refuse(driver, True)
    async with index.held(driver.store.delete(TENANT, "a")) as deleting:
        putting = asyncio.create_task(driver.put("a", LONG))
        await asyncio.sleep(0)
        assert driver.store.agent(TENANT, "a") is not None
    with pytest.raises(StorageUnavailable):
        await deleting
    make_index_refuse(driver, False)
    await putting
    await driver.store.flush()
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert driver.store.tokens(TENANT, "a").tolist() == LONG.tolist()
    await driver.close()


async def test_a_delete_that_succeeds_ends_a_commit_in_flight(tmp_path: Path, index: SlowIndex) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", SHORT)
    async with index.held(driver.store.delete(TENANT, "a")) as deleting:
        putting = asyncio.create_task(driver.put("a", LONG))
        await asyncio.sleep(0)
    assert await deleting
    with pytest.raises(AgentDeleted):
        await putting
    assert not seen(driver)
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert not seen(driver)
    await driver.close()
