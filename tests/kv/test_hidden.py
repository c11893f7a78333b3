"""Hidden agents: contexts of requests without an agent, within their bounds, and never at the cost of others."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kv.books import check_directory, check_sums
from tests.kv.disk import RefusingFiles, make_index_refuse
from tests.kv.driver import OTHER_MODEL, TENANT, Driver, eventually
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.kv import Source
from warmkv_server.contract.names import hidden_id
from warmkv_server.contract.store import Tier
from warmkv_server.errors import StorageUnavailable
from warmkv_server.kv.store import Committed, TokenIds


async def keep(driver: Driver, tokens: TokenIds, **changes: Any) -> Committed:
    """As a request without an agent, whose context is kept."""
    _, committed = await driver.put("", tokens, kept_as=hidden_id(), ttl=3600.0, answer=True, **changes)
    return committed


def hidden(driver: Driver) -> int:
    return driver.store.stats().hidden_agents


def turns(chat: int, number: int) -> TokenIds:
    """A chat's context after so many turns."""
    return context([chat * 10_000 + n for n in range(150 * number)])


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_one_context_of_each_chat_stays(tmp_path: Path, layout: str) -> None:
    driver = await Driver.open(tmp_path, LAYOUTS[layout])
    for number in range(1, 7):
        for chat in range(4):
            await keep(driver, turns(chat, number))
    await driver.store.settled()
    assert hidden(driver) == 4
    for chat in range(4):
        reuse = await driver.reuse("", turns(chat, 7), limit=150 * 7 - 1)
        assert (reuse.length, reuse.source) == (150 * 6, Source.HOT)
    assert not list(driver.store.agents(TENANT))
    assert driver.store.stats().agents_by_tier == {}
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()


async def test_the_same_again_leaves_one_and_a_branch_another(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    for _ in range(5):
        await keep(driver, turns(1, 3))
    await driver.store.settled()
    assert hidden(driver) == 1
    await keep(driver, context(turns(1, 2).tolist(), [7] * 40))
    await keep(driver, turns(1, 2))  # its beginning is in the first, and it may yet be gone on with
    await keep(driver, context(turns(1, 2).tolist(), [8] * 3))  # a tail in the same block
    await driver.store.settled()
    assert hidden(driver) == 3
    check_sums(driver.store)
    await driver.close()


async def test_two_at_once_that_go_on_with_the_same(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await keep(driver, turns(1, 2))
    both = [context(turns(1, 2).tolist(), [n] * 300) for n in (7, 8)]
    await asyncio.gather(*[keep(driver, tokens) for tokens in both])
    await driver.store.settled()
    assert hidden(driver) == 2
    for tokens in both:
        assert (await driver.reuse("", tokens)).length == len(tokens)
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()


async def test_their_bytes_are_bounded_and_the_least_recent_go(tmp_path: Path) -> None:
    limit = 1_000_000
    driver = await Driver.open(tmp_path, anonymous_bytes=limit)
    named = context([5] * 900)
    await driver.put("named", named)
    before = driver.store.agent(TENANT, "named")
    for chat in range(60):
        await keep(driver, turns(chat, 4))
        assert driver.store.stats().hidden_bytes <= 1.2 * limit  # what one commit brings
    await driver.store.settled()
    assert driver.store.stats().hidden_bytes <= limit
    assert 1 < hidden(driver) < 60
    assert (await driver.reuse("", turns(59, 4))).length == 600
    assert not (await driver.reuse("", turns(0, 4))).length
    assert driver.store.agent(TENANT, "named") == before
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()


async def test_one_that_is_larger_than_all_may_be_pushes_nobody_out(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, anonymous_bytes=500_000)
    await keep(driver, turns(1, 1))
    await keep(driver, turns(2, 20))
    await driver.store.settled()
    assert hidden(driver) == 1
    assert (await driver.reuse("", turns(1, 1))).length == 150
    await driver.close()


async def test_what_named_agents_have_in_common_with_them_is_not_counted(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await keep(driver, turns(1, 6))
    alone = driver.store.stats().hidden_bytes
    await driver.put("named", turns(1, 5))
    assert driver.store.stats().hidden_bytes < 0.5 * alone
    await driver.store.settled()
    check_sums(driver.store)
    await driver.store.delete(TENANT, "named")
    await driver.store.settled()
    assert driver.store.stats().hidden_bytes == alone
    check_sums(driver.store)
    await driver.close()


async def test_they_leave_ram_before_any_agent_does(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, hot_bytes=1_500_000)
    other = Driver(driver.store, driver.layout, "other")
    for number in range(3):
        await driver.put(str(number), context([number] * 600))
    for chat in range(20):
        await keep(driver, turns(chat, 4))
        await keep(other, turns(chat, 4))
    await driver.store.settled()
    assert {record.tier for record in driver.store.agents(TENANT)} == {Tier.HOT}
    for number in range(3, 6):  # now what agents have is too much by itself
        await driver.put(str(number), context([number] * 600))
    assert driver.store.stats().hot_bytes <= 1_500_000
    assert (await driver.reuse("", turns(19, 4))).source is Source.WARM
    check_sums(driver.store)
    await driver.close()


async def test_they_leave_the_disk_before_any_agent_loses_something(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, hot_bytes=0, disk_bytes=4_000_000)
    for chat in range(8):
        await keep(driver, turns(chat, 4))
    contexts = {str(number): context([number] * 600) for number in range(10)}
    for agent, tokens in contexts.items():
        assert (await driver.put(agent, tokens))[1].persisted
        await driver.store.settled()
    assert hidden(driver) < 8
    kept = [(await driver.reuse(agent, tokens)).length for agent, tokens in contexts.items()]
    assert kept == [600] * 10
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()


async def test_they_take_nothing_from_agents_who_fill_the_disk(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, hot_bytes=0, disk_bytes=4_000_000)
    number = 0
    while True:
        await driver.put(str(number), context([number] * 600))
        if driver.store.stats().disk_bytes > 3_500_000:
            break
        number += 1
    lost = 0
    for chat in range(20):
        try:
            await keep(driver, turns(chat, 6))
        except StorageUnavailable:
            lost += 1
    await driver.store.settled()
    assert lost
    for each in range(number + 1):
        assert (await driver.reuse(str(each), context([each] * 600))).length == 600
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()


@pytest.mark.parametrize("what", ["files", "index"])
async def test_nothing_is_kept_in_ram_for_them_where_the_disk_refuses(tmp_path: Path, what: str) -> None:
    files = RefusingFiles()
    driver = await Driver.open(tmp_path, files=files, retry_seconds=3600.0)
    await keep(driver, turns(1, 1))
    if what == "files":
        files.refusal = 28
    else:
        make_index_refuse(driver, True)
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            await keep(driver, turns(1, 4))
    await driver.store.settled()
    stats = driver.store.stats()
    assert (stats.hidden_agents, stats.not_durable) == (1, 0)
    files.refusal = None
    make_index_refuse(driver, False)
    assert (await keep(driver, turns(1, 4))).persisted
    await driver.store.settled()
    assert hidden(driver) == 1
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()


async def test_they_are_there_after_a_restart_until_their_time_is_up(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await keep(driver, turns(1, 3))
    await driver.close()
    driver = await Driver.open(tmp_path)
    reuse = await driver.reuse("", turns(1, 4), limit=599)
    assert (reuse.length, reuse.source) == (450, Source.WARM)
    _, committed = await driver.put("", turns(1, 4), kept_as=hidden_id(), ttl=0.2)
    assert committed.agent.ttl == 0.2
    await driver.close()
    driver = await Driver.open(tmp_path)
    await eventually(lambda: not hidden(driver))
    await driver.store.settled()
    assert not driver.store.core.index.nodes
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()


async def test_a_start_deletes_what_a_crash_has_left(tmp_path: Path) -> None:
    """Between a commit and the deletion of what it goes on with."""
    before, after = tmp_path / "before", tmp_path / "after"
    driver = await Driver.open(before)
    await keep(driver, turns(1, 1))
    await keep(driver, turns(1, 2))
    shutil.copytree(before, after)  # as it is now: nothing else has its turn meanwhile
    await driver.close()
    crashed = await Driver.open(after)
    assert hidden(crashed) == 2
    await eventually(lambda: hidden(crashed) == 1)
    assert (await crashed.reuse("", turns(1, 2))).length == 300
    await crashed.close()


async def test_a_start_with_a_smaller_limit_keeps_it(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    for number in (1, 2, 3, 4):
        await keep(driver, turns(1, number))
        await keep(driver, turns(2, number))
        await driver.store.settled()
    longest = driver.store.stats().hidden_bytes
    await driver.close()
    driver = await Driver.open(tmp_path, anonymous_bytes=longest // 2)
    await eventually(lambda: hidden(driver) == 1)
    assert (await driver.reuse("", turns(2, 4))).length == 600
    check_sums(driver.store)
    await driver.close()


async def test_another_model_finds_none_and_another_tenant_neither(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await keep(driver, turns(1, 3))
    other = Driver(driver.store, driver.layout, "other")
    assert not (await other.reuse("", turns(1, 3))).length
    await driver.close()
    driver = await Driver.open(tmp_path, fingerprint=OTHER_MODEL)
    assert not (await driver.reuse("", turns(1, 3))).length
    assert driver.store.stats().stale_agents == 0
    assert driver.store.stale() == {}
    await driver.close()


async def test_many_stay_within_the_limit(tmp_path: Path) -> None:
    """Ten at once, two hundred and fifty in all, of chats that begin alike and of others."""
    limit = 2_000_000
    driver = await Driver.open(tmp_path, anonymous_bytes=limit, hot_bytes=1_000_000)
    named = context(400, [1] * 100)
    await driver.put("named", named)
    rng = np.random.default_rng(0)
    largest = 0

    async def ask() -> None:
        nonlocal largest
        for _ in range(25):
            tokens = context(400, (rng.integers(0, 3, 1) * 5000 + np.arange(int(rng.integers(1, 400)))).tolist())
            await keep(driver, context(tokens.tolist(), rng.integers(0, 9000, 20).tolist()))
            largest = max(largest, driver.store.stats().hidden_bytes)

    await asyncio.gather(*[ask() for _ in range(10)])
    await driver.store.settled()
    assert largest <= limit + 10 * 150_000  # what is being written beside it
    assert driver.store.stats().hidden_bytes <= limit
    assert (await driver.reuse("named", named)).length == len(named)
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()
