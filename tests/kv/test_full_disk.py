"""A disk that is full, read-only or broken: requests go on in RAM, and what they made is written when it can be."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kv.disk import RefusingFiles, make_index_refuse
from tests.kv.driver import TENANT, Driver, eventually
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.kv import Source
from warmkv_server.errors import MemoryBudget, NotDurable, StorageUnavailable
from warmkv_server.kv.catalog.lock import DirectoryLock
from warmkv_server.kv.index.records import RequestOutcome

ENDLESS = 3600.0
"""Seconds; a pause between retries that no test lives to see."""


async def recovered(driver: Driver) -> None:
    """Wait until the store has written by itself what the disk refused."""
    await eventually(lambda: not driver.store.stats().not_durable)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
async def test_a_commit_that_the_disk_refuses_stays_usable_and_is_written_later(tmp_path: Path, code: int) -> None:
    files = RefusingFiles()
    driver = await Driver.open(tmp_path, LAYOUTS["everything"], files=files)
    await driver.put("a", context(300))
    files.refusal = code
    longer = context(300, [1] * 400)
    _, committed = await driver.put("a", longer, answer=True)
    assert not committed.persisted
    assert not committed.agent.durable
    assert committed.agent.revision == 2
    stats = driver.store.stats()
    assert (stats.commits_failed, stats.not_durable) == (1, 1)
    with pytest.raises(NotDurable):
        await driver.store.evict(TENANT, "a")
    reuse = await driver.reuse("a", context(longer.tolist(), [2] * 10))
    assert (reuse.source, reuse.length) == (Source.HOT, 700)
    _, committed = await driver.put("a", context(longer.tolist(), [3] * 10))
    assert not committed.persisted

    files.refusal = None
    await recovered(driver)
    record = driver.store.agent(TENANT, "a")
    assert record is not None
    assert record.durable
    await driver.close()
    driver = await Driver.open(tmp_path, LAYOUTS["everything"])
    assert (await driver.reuse("a", context(longer.tolist(), [3] * 10))).warm_tokens == 710
    await driver.close()


async def test_whoever_watches_is_told_when_the_disk_begins_to_refuse_and_when_it_ends(tmp_path: Path) -> None:
    files, told = RefusingFiles(), list[bool]()
    driver = await Driver.open(tmp_path, files=files, tell=told.append)
    await driver.put("a", context(300))
    assert told == [True]
    files.refusal = errno.ENOSPC
    await driver.put("a", context(400))
    await driver.put("b", context(500))
    assert told == [True, False]
    files.refusal = None
    await recovered(driver)
    assert told == [True, False, True]
    await driver.close()


async def test_an_index_that_refuses_keeps_the_agent_in_ram_and_its_outcome_too(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    make_index_refuse(driver, True)
    _, committed = await driver.put(
        "a", context(300), request=lambda _, persisted: RequestOutcome("r", b"h", str(persisted).encode())
    )
    assert not committed.persisted
    outcome = await driver.store.outcome(TENANT, "r")
    assert outcome is not None
    assert outcome.payload == b"False"
    make_index_refuse(driver, False)
    await recovered(driver)
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert await driver.store.outcome(TENANT, "r") == outcome
    assert (await driver.reuse("a", context(300))).length == 300
    await driver.close()


async def test_what_needs_the_disk_says_so_and_changes_nothing(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, retry_seconds=ENDLESS)
    await driver.put("a", context(300))
    make_index_refuse(driver, True)
    with pytest.raises(StorageUnavailable):
        await driver.store.delete(TENANT, "a")
    with pytest.raises(StorageUnavailable):
        await driver.store.fork(TENANT, "a", "b")
    with pytest.raises(StorageUnavailable):
        await driver.store.update(TENANT, "a", pinned=True, labels={"k": "v"}, ttl=5.0)
    make_index_refuse(driver, False)
    assert driver.store.agent(TENANT, "b") is None
    record = driver.store.agent(TENANT, "a")
    assert record is not None
    assert (record.pinned, record.labels, record.ttl) == (False, {}, None)
    assert (await driver.reuse("a", context(300))).length == 300
    await driver.close()


async def test_a_server_that_dies_before_the_disk_recovers_starts_with_the_last_durable_state(tmp_path: Path) -> None:
    files = RefusingFiles()
    driver = await Driver.open(tmp_path, LAYOUTS["window"], files=files, retry_seconds=ENDLESS)
    await driver.put("a", context(700))
    files.refusal = errno.ENOSPC
    await driver.put("a", context([5] * 10))
    await driver.put("a", context(500, [6] * 600))
    await driver.close()
    driver = await Driver.open(tmp_path, LAYOUTS["window"])
    record = driver.store.agent(TENANT, "a")
    assert record is not None
    assert (record.revision, record.token_count) == (1, 700)
    assert (await driver.reuse("a", context(700))).warm_tokens == 700
    await driver.close()


async def test_what_the_disk_refuses_may_fill_the_memory_budget_but_not_more(tmp_path: Path) -> None:
    files = RefusingFiles()
    driver = await Driver.open(tmp_path, files=files, hot_bytes=200_000, retry_seconds=ENDLESS)
    files.refusal = errno.ENOSPC
    await driver.put("0", context([0] * 300))
    await driver.put("1", context([1] * 300))
    with pytest.raises(MemoryBudget):
        await driver.put("2", context([2] * 300))
    assert driver.store.agent(TENANT, "2") is None
    await driver.store.settled()
    assert driver.store.stats().hot_bytes < 200_000
    await driver.close()


async def test_free_space_below_the_headroom_counts_as_full(tmp_path: Path) -> None:
    volume = os.statvfs(tmp_path)
    driver = await Driver.open(tmp_path, headroom_bytes=volume.f_blocks * volume.f_frsize * 2, retry_seconds=ENDLESS)
    _, committed = await driver.put("a", context(300))
    assert not committed.persisted
    await driver.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 3 MiB."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", tmp_path], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small filesystem needs to be allowed")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


async def test_a_filesystem_that_is_really_full(small_disk: Path) -> None:
    driver = await Driver.open(small_disk)
    agents = 0
    while (await driver.put(str(agents), context([agents] * 1000)))[1].persisted:
        agents += 1
        assert agents < 100
    assert agents > 3
    reuse = await driver.reuse(str(agents), context([agents] * 1000, [1]))
    assert (reuse.source, reuse.length) == (Source.HOT, 1000)
    for number in range(agents - 1):
        await driver.store.delete(TENANT, str(number))
    await recovered(driver)
    await driver.store.evict(TENANT, str(agents))
    assert (await driver.reuse(str(agents), context([agents] * 1000))).warm_tokens == 1000
    await driver.close()


async def test_a_server_starts_on_a_full_disk_and_deletes_make_room(small_disk: Path) -> None:
    driver = await Driver.open(small_disk)
    await driver.put("a", context(1000))
    await driver.close()
    fill(small_disk / "somebody else's")
    driver = await Driver.open(small_disk, headroom_bytes=1 << 20)
    assert (await driver.reuse("a", context(1000))).warm_tokens == 1000
    _, committed = await driver.put("b", context([1] * 5000))
    assert not committed.persisted
    assert await driver.store.delete(TENANT, "a")
    await driver.close()


def fill(path: Path) -> None:
    """Write until the disk is full to the last page."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_full_disk_keeps_nobody_from_taking_a_directory(small_disk: Path) -> None:
    fill(small_disk / "somebody else's")
    DirectoryLock(small_disk).release()
