"""Budgets that tenants share: who has less than its equal share never loses to one who has more."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.kv.books import check_directory, check_sums
from tests.kv.disk import RefusingFiles
from tests.kv.driver import Driver
from tests.kv.words import context
from warmkv_server.contract.store import Tier
from warmkv_server.errors import MemoryBudget

DISK = 6_000_000
RAM = 3_000_000
BLOCKS = 3
TOKENS = 256 * BLOCKS
"""Of each context here; none has a block in common with another."""


async def fill(driver: Driver, count: int, *, pinned: bool = False, first: int = 0) -> list[bool]:
    """As many agents; whether each is on disk."""
    return [
        (await driver.put(str(n), context([1000 * len(driver.tenant) + n] * TOKENS), pinned=pinned))[1].persisted
        for n in range(first, first + count)
    ]


async def kept(driver: Driver, count: int, first: int = 0) -> int:
    """How many of them lost nothing, neither in RAM nor on disk."""
    contexts = {n: context([1000 * len(driver.tenant) + n] * TOKENS) for n in range(first, first + count)}
    return sum([(await driver.reuse(str(n), tokens)).length == TOKENS for n, tokens in contexts.items()])


def on_disk(driver: Driver) -> int:
    return sum(record.warm_bytes for record in driver.store.agents(driver.tenant))


async def open_two(data_dir: Path, **changes: Any) -> tuple[Driver, Driver]:
    one = await Driver.open(data_dir, **changes)
    return one, Driver(one.store, one.layout, "other")


@pytest.mark.parametrize("pinned", [False, True])
async def test_one_who_fills_the_disk_keeps_nobody_out(tmp_path: Path, pinned: bool) -> None:
    flood, other = await open_two(tmp_path, disk_bytes=DISK, hot_bytes=0)
    if pinned:
        assert all(await fill(flood, 12, pinned=True))
    else:
        assert all(await fill(flood, 60))
    assert on_disk(flood) > 0.4 * DISK  # more than is left for blocks, halved
    assert all(await fill(other, 6))
    await other.store.settled()
    assert await kept(other, 6) == 6
    check_sums(other.store)
    check_directory(other.store, tmp_path)
    await flood.close()


async def test_who_has_less_than_its_share_of_the_disk_loses_nothing_to_a_flood(tmp_path: Path) -> None:
    flood, other = await open_two(tmp_path, disk_bytes=DISK, hot_bytes=0)
    assert all(await fill(other, 6))
    assert all(await fill(flood, 60))
    assert await kept(other, 6) == 6
    assert await kept(flood, 60) >= 4
    await flood.close()


async def test_two_floods_end_with_about_half_of_the_disk_each(tmp_path: Path) -> None:
    flood, other = await open_two(tmp_path, disk_bytes=DISK, hot_bytes=0)
    for number in range(40):
        assert all(await fill(flood, 2, first=2 * number))
        assert all(await fill(other, 1, first=number))
    both = on_disk(flood) + on_disk(other)
    assert min(on_disk(flood), on_disk(other)) >= 0.4 * both
    await flood.close()


@pytest.mark.parametrize("pinned", [False, True])
async def test_who_has_less_than_its_share_of_ram_stays_there(tmp_path: Path, pinned: bool) -> None:
    flood, other = await open_two(tmp_path, hot_bytes=RAM)
    await fill(other, 4)
    await fill(flood, 30, pinned=pinned)
    assert [record.tier for record in other.store.agents(other.tenant)] == [Tier.HOT] * 4
    assert other.store.stats().hot_bytes <= RAM
    await fill(other, 2, first=4)
    assert {record.tier for record in other.store.agents(other.tenant)} == {Tier.HOT}
    assert other.store.stats().hot_bytes <= RAM
    check_sums(other.store)
    await flood.close()


async def test_who_fills_ram_with_what_the_disk_refuses_leaves_others_their_share(tmp_path: Path) -> None:
    files = RefusingFiles()
    flood = await Driver.open(tmp_path, files=files, hot_bytes=RAM, tenants=2, retry_seconds=3600.0)
    other = Driver(flood.store, flood.layout, "other")
    files.refusal = errno.ENOSPC
    with pytest.raises(MemoryBudget):
        await fill(flood, 60)
    assert await fill(other, 3) == [False] * 3
    assert await kept(other, 3) == 3
    assert flood.store.stats().hot_bytes <= RAM
    files.refusal = None
    await flood.close()
