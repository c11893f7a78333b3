"""Who follows which contexts' KV is at hand: told all, then what changes, and all again where that is too much."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from tests.kv.driver import OTHER_MODEL, TENANT, Driver
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.names import hidden_id
from warmkv_server.contract.store import HeldChange, HeldSnapshot
from warmkv_server.kv.store import HeldContexts
from warmkv_server.kv.tasks import held_contexts


class Follower:
    """What a reader makes of the events."""

    def __init__(self, held: HeldContexts) -> None:
        self.held = held
        self.contexts: dict[int, list[int]] = {}
        self.snapshots = 0

    async def read(self) -> HeldSnapshot | HeldChange:
        """The next event."""
        async with asyncio.timeout(60):
            event = await anext(self.held)
        if isinstance(event, HeldSnapshot):
            self.snapshots += 1
            self.contexts = {number: tokens.tolist() for number, tokens in event.contexts.items()}
        else:
            assert self.contexts.get(event.context, []) == event.before.tolist()
            self.contexts[event.context] = event.after.tolist()
            if not len(event.after):
                del self.contexts[event.context]
        return event

    async def read_all(self) -> list[list[int]]:
        """What there is, once there is nothing more to be told."""
        pending = asyncio.ensure_future(self.read())
        while True:
            for _ in range(3):
                await asyncio.sleep(0)
            if not pending.done():
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
                return sorted(self.contexts.values())
            pending.result()
            pending = asyncio.ensure_future(self.read())


def held_now(driver: Driver) -> list[list[int]]:
    """From the books: the beginning of each context that is in RAM or on disk."""
    core = driver.store.core
    found = []
    for agent in core.index.agents.values():
        end = 0
        for node in agent.nodes:
            if not all(core.has(node, kind) for kind in core.layout.everywhere):
                break
            end = node.end
        found.append(agent.tokens[:end].tolist())
    return sorted(each for each in found if each)


@pytest.mark.parametrize("layout", ["append", "everything", "recurrent"])
async def test_what_comes_and_goes_is_told(tmp_path: Path, layout: str) -> None:
    driver = await Driver.open(tmp_path, LAYOUTS[layout])
    await driver.put("a", context(300))
    async with driver.store.held(TENANT) as held:
        follower = Follower(held)
        assert await follower.read_all() == [list(range(300))]
        for work in (
            driver.put("a", context(400)),
            driver.put("b", context([7] * 100)),
            driver.store.fork(TENANT, "a", "c"),
            driver.put("c", context(200)),
            driver.put("", context(500), kept_as=hidden_id(), ttl=60.0),
            driver.put("", context(600), kept_as=hidden_id(), ttl=60.0),
            driver.store.evict(TENANT, "a"),
            driver.store.delete(TENANT, "a"),
            Driver(driver.store, driver.layout, "other").put("a", context([9] * 40)),
        ):
            await work
            await driver.store.settled()
            others = [[9] * 40]
            assert await follower.read_all() == [each for each in held_now(driver) if each not in others]
        assert follower.snapshots == 1
    with pytest.raises(StopAsyncIteration):
        await anext(held)
    await driver.close()


async def test_what_the_quota_takes_is_told_and_what_is_computed_anew(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, hot_bytes=0, disk_bytes=3_000_000)
    async with driver.store.held(TENANT) as held:
        follower = Follower(held)
        for number in range(14):
            await driver.put(str(number), context([number] * 600))
            assert await follower.read_all() == held_now(driver)
        assert [0] * 600 not in follower.contexts.values()
        await driver.put("0", context([0] * 600))
        assert await follower.read_all() == held_now(driver)
        assert [0] * 600 in follower.contexts.values()
    await driver.close()


async def test_another_models_contexts_are_not_at_hand(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(300))
    await driver.close()
    driver = await Driver.open(tmp_path, fingerprint=OTHER_MODEL)
    async with driver.store.held(TENANT) as held:
        assert await Follower(held).read_all() == []
    await driver.close()


async def test_a_slow_reader_is_told_everything_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_contexts, "MOST_CHANGED", 5)
    driver = await Driver.open(tmp_path)
    async with driver.store.held(TENANT) as slow, driver.store.held(TENANT) as quick:
        followers = [Follower(slow), Follower(quick)]
        for follower in followers:
            await follower.read_all()
        for number in range(12):
            await driver.put(str(number), context([number] * 10))
            await driver.put(str(number), context([number] * 20))
            await followers[1].read_all()
        await driver.store.delete(TENANT, "3")
        for follower in followers:
            assert await follower.read_all() == held_now(driver)
        assert [follower.snapshots for follower in followers] == [2, 1]
    await driver.close()


async def test_who_waits_is_woken_and_ends_with_the_subscription(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    held = driver.store.held(TENANT)
    assert await anext(held) == HeldSnapshot({})
    waiting = asyncio.ensure_future(anext(held))
    await asyncio.sleep(0)
    await driver.put("a", context(10))
    event = await asyncio.wait_for(waiting, 60)
    assert isinstance(event, HeldChange)
    assert np.array_equal(event.after, context(10))
    ending = asyncio.ensure_future(anext(held))
    await asyncio.sleep(0)
    await held.aclose()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(ending, 60)
    await driver.put("b", context(10))
    await driver.close()
