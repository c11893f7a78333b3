"""Something breaks that nobody foresaw: not a disk that refuses, but a bug. It fails the call that it breaks and no
other, and whatever was acknowledged before and after it is there, also after a restart.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kv.driver import TENANT, Driver, eventually
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.kv import Source
from warmkv_server.contract.store import Durability
from warmkv_server.kv.blocks.disk import DiskBlock, DiskTier
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog.rebuild import aside_files
from warmkv_server.kv.index.records import RequestOutcome
from warmkv_server.offline.directory import look
from warmkv_server.offline.verify import verify

LAYOUT = LAYOUTS["everything"]
TOKENS = context(1000)
LONGER = context(1000, [7] * 300)
OTHER = context([3] * 700)


class Bug(Exception):
    """What no code expects."""


class BuggyFiles(Files):
    """Real files; `step` raises when it is called for the `at`-th time from now on."""

    def __init__(self) -> None:
        super().__init__(Durability.FSYNC)
        self.step, self.at = "", 0
        self._lock = threading.Lock()

    def _count(self, step: str) -> None:
        if step == self.step:
            with self._lock:  # several threads write
                self.at -= 1
                if self.at == 0:
                    raise Bug(step)

    def write(self, path: Path, buffers: Sequence[memoryview]) -> int:
        kind = "block" if "blocks" in path.parts else "manifest"
        self._count(f"before a {kind}")
        size = super().write(path, buffers)
        self._count(f"behind a {kind}")
        return size

    def sync_folder(self, folder: Path) -> None:
        if "blocks" in folder.parts:
            self._count("sync")
        super().sync_folder(folder)

    def unlink(self, path: Path) -> None:
        if "blocks" in path.parts:
            self._count("unlink")
        super().unlink(path)


@contextmanager
def breaking(driver: Driver, *, after: bool) -> Iterator[None]:
    """The index's next transaction raises, before or after it has happened."""
    database = driver.store.core.journal.database
    apply = database.apply

    def broken(statements: Any, number: int | None = None) -> None:
        database.apply = apply  # type: ignore[method-assign]
        if after:
            apply(statements, number)
        raise Bug("the index")

    database.apply = broken  # type: ignore[method-assign]
    try:
        yield
    finally:
        database.apply = apply  # type: ignore[method-assign]


async def as_after_a_restart(tmp_path: Path, driver: Driver, **contexts: Any) -> None:
    """Each of these agents is there with these tokens, every word of them, now and then."""
    for _ in range(2):
        assert {record.agent_id for record in driver.store.agents(TENANT)} == set(contexts)
        for agent, tokens in contexts.items():
            assert driver.store.tokens(TENANT, agent).tolist() == tokens.tolist()
            reuse = await driver.reuse(agent, tokens)
            assert (reuse.length, reuse.fallback) == (len(tokens), None)
        assert driver.store.core.hot.unsaved_bytes == 0
        await driver.store.settled()
        await driver.close()
        driver = await Driver.open(tmp_path, LAYOUT)
        assert aside_files(tmp_path) == []
    await driver.close()
    assert verify(lambda: look(tmp_path)).problems == []


STEPS = [("before a block", 1), ("before a block", 4), ("behind a block", 3), ("sync", 1)]


@pytest.mark.parametrize(("step", "at"), STEPS)
async def test_a_file_that_can_not_be_made_fails_its_commit_alone(tmp_path: Path, step: str, at: int) -> None:
    files = BuggyFiles()
    driver = await Driver.open(tmp_path, LAYOUT, files=files)
    await driver.put("a", TOKENS)
    await driver.store.settled()
    files.step, files.at = step, at
    results = await asyncio.gather(
        driver.put("a", LONGER), driver.put("b", OTHER), driver.put("c", TOKENS), return_exceptions=True
    )
    assert [type(each) for each in results if isinstance(each, BaseException)] == [Bug]
    assert driver.store.stats().not_durable == 0
    kept = {
        agent: tokens
        for (agent, tokens), result in zip((("a", LONGER), ("b", OTHER), ("c", TOKENS)), results, strict=True)
        if not isinstance(result, BaseException)
    }
    await driver.put("d", OTHER)
    await as_after_a_restart(tmp_path, driver, **{"a": TOKENS, **kept, "d": OTHER})


@pytest.mark.parametrize("after", [False, True])
async def test_a_transaction_that_breaks_leaves_one_state_not_two(tmp_path: Path, after: bool) -> None:
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("a", TOKENS)
    await driver.store.settled()
    with breaking(driver, after=after), pytest.raises(Bug):
        await driver.put("a", LONGER)
    await driver.put("b", OTHER)
    await eventually(lambda: driver.store.stats().not_durable == 0)
    longest = context(1000, [7] * 300, [8] * 100)
    await driver.put("a", longest)
    await as_after_a_restart(tmp_path, driver, a=longest, b=OTHER)


async def test_a_record_that_can_not_be_made_leaves_one_state_not_two(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("a", TOKENS)

    def record(*_: Any) -> RequestOutcome:
        raise Bug("the record")

    with pytest.raises(Bug):
        await driver.put("a", LONGER, request=record)
    await eventually(lambda: driver.store.stats().not_durable == 0)
    longest = context(1000, [7] * 300, [8] * 100)
    await driver.put("a", longest)
    await as_after_a_restart(tmp_path, driver, a=longest)


async def test_words_that_are_not_there_fail_the_commit_and_keep_nothing(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("a", TOKENS)
    await driver.put("b", OTHER)
    driver.layout = LAYOUTS["append"]  # what it computes lacks windows and snapshots
    with pytest.raises((LookupError, AssertionError)):
        await driver.put("a", LONGER)
    driver.layout = LAYOUT
    await as_after_a_restart(tmp_path, driver, a=TOKENS, b=OTHER)


Call = Callable[[Driver], Any]
CALLS: dict[str, Call] = {
    "fork": lambda driver: driver.store.fork(TENANT, "a", "copy"),
    "update": lambda driver: driver.store.update(TENANT, "a", pinned=True, ttl=9.0, labels={"k": "v"}),
    "delete": lambda driver: driver.store.delete(TENANT, "a"),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_change_that_breaks_has_not_happened(tmp_path: Path, call: str) -> None:
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("a", TOKENS)
    await driver.store.settled()
    before = driver.store.agent(TENANT, "a")
    with breaking(driver, after=False), pytest.raises(Bug):
        await CALLS[call](driver)
    assert driver.store.agent(TENANT, "a") == before
    await driver.put("a", LONGER)
    await as_after_a_restart(tmp_path, driver, a=LONGER)


class BuggyTier(DiskTier):
    """The disk; the first object of the node `breaks` (in hex) that is opened raises."""

    breaks = ""

    def open(self, name: str) -> DiskBlock:
        if self.breaks and name.startswith(self.breaks):
            self.breaks = ""
            raise Bug("reading")
        return super().open(name)


async def test_a_read_that_breaks_fails_those_who_wait_for_it_alone(tmp_path: Path) -> None:
    tier = BuggyTier(tmp_path, Files(Durability.NONE), 0)
    driver = await Driver.open(tmp_path, LAYOUT, tier=tier)
    await driver.put("a", TOKENS)
    await driver.put("b", OTHER)
    for agent in "ab":
        await driver.store.evict(TENANT, agent)
    first = driver.store.core.existing(TENANT, "b").nodes[0]
    tier.breaks = first.id.hex()
    good, *bad = await asyncio.gather(
        driver.reuse("a", TOKENS), driver.reuse("b", OTHER), driver.reuse("b", OTHER), return_exceptions=True
    )
    assert not isinstance(good, BaseException)
    assert (good.source, good.length) == (Source.WARM, 1000)
    assert [type(each) for each in bad] == [Bug, Bug]
    await as_after_a_restart(tmp_path, driver, a=TOKENS, b=OTHER)


async def test_a_collection_that_breaks_leaves_what_is_needed(tmp_path: Path) -> None:
    files = BuggyFiles()
    driver = await Driver.open(tmp_path, LAYOUT, files=files)
    await driver.put("a", TOKENS)
    await driver.put("b", OTHER)
    await driver.store.settled()
    files.step, files.at = "unlink", 2
    assert await driver.store.delete(TENANT, "a")
    await driver.store.settled()
    await driver.put("c", TOKENS)  # the same blocks again
    await driver.close()
    driver = await Driver.open(tmp_path, LAYOUT)
    await as_after_a_restart(tmp_path, driver, b=OTHER, c=TOKENS)


async def test_a_manifest_that_can_not_be_written_is_tried_again(tmp_path: Path) -> None:
    files = BuggyFiles()
    driver = await Driver.open(tmp_path, LAYOUT, files=files)
    files.step, files.at = "before a manifest", 1
    await driver.put("a", TOKENS)
    await eventually(lambda: files.at <= 0)
    await driver.put("b", OTHER)
    await eventually(lambda: files.at <= -2)
    await as_after_a_restart(tmp_path, driver, a=TOKENS, b=OTHER)
