"""What happens at the same moment: commits of one context, a use beside an expiry, a deletion beside a manifest."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.kv.driver import TENANT, Driver, eventually
from tests.kv.test_clock import Machine
from tests.kv.test_limits import damage_all
from tests.kv.words import LAYOUTS, context, grow
from warmkv_server.contract.kv import Reuse, Source
from warmkv_server.contract.store import Durability
from warmkv_server.kv.blocks.disk import quarantine
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog.database import Statement
from warmkv_server.kv.index.records import Commit, Committed, RequestOutcome, TokenIds

TOKENS = context(1000)
WAIT_SECONDS = 10.0
ENDLESS = 3600.0


class NamedFiles(Files):
    """Real files; knows which names of blocks a power cut could take back.

    Attributes:
        hold: while it is clear, the first folder of blocks to be synced waits, and the removal of a manifest.
        held: somebody has come to wait.
        good: blocks until the disk is full; None for no end.
    """

    def __init__(self) -> None:
        super().__init__(Durability.FSYNC)
        self.unsynced: set[Path] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.held = threading.Event()
        self.good: int | None = None
        self._lock = threading.Lock()

    def write(self, path: Path, buffers: Sequence[memoryview]) -> int:
        with self._lock:
            if "blocks" in path.parts and self.good is not None:
                self.good -= 1
                if self.good < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().write(path, buffers)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        with self._lock:
            if "blocks" in target.parts:
                self.unsynced.add(target)

    def sync_folder(self, folder: Path) -> None:
        if "blocks" in folder.parts and not self.held.is_set():
            self._wait()
        with self._lock:
            before = {path for path in self.unsynced if path.parent == folder}
        super().sync_folder(folder)
        with self._lock:
            self.unsynced -= before

    def unlink(self, path: Path) -> None:
        if "agents" in path.parts and not self.held.is_set():
            self._wait()
        super().unlink(path)

    def _wait(self) -> None:
        if not self.hold.is_set():
            self.held.set()
            self.hold.wait(WAIT_SECONDS)


async def compute(driver: Driver, agent: str, tokens: TokenIds) -> Committed:
    """Make it the agent's context without reuse, as where another has committed it a moment ago."""
    with driver.store.resolve(TENANT, agent, tokens, 0) as lease:
        growth = grow(driver.layout, tokens, 0)
        return await driver.store.commit(Commit(TENANT, agent, lease.incarnation, tokens, Reuse(), growth, lease))


async def test_two_commits_that_find_one_bad_file_make_it_anew_once(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", TOKENS)
    await driver.store.evict(TENANT, "a")
    files, taken = driver.store.stats().disk_bytes, driver.store.core.accounts.block_bytes
    damage_all(tmp_path)
    done = await asyncio.gather(*(compute(driver, agent, TOKENS) for agent in "bcd"))
    assert all(committed.persisted for committed in done)
    assert driver.store.core.accounts.block_bytes == taken
    assert driver.store.stats().disk_bytes > files  # what is in quarantine
    await driver.store.evict(TENANT, "a")
    assert (await driver.reuse("d", TOKENS)).warm_tokens == 1000
    await driver.close()


class SlowQuarantine(Files):
    """Real files; while `free` is clear, whoever moves one into quarantine waits before it does."""

    def __init__(self) -> None:
        super().__init__(Durability.NONE)
        self.free = threading.Event()
        self.waits = threading.Event()

    def rename(self, source: Path, target: Path) -> None:
        if "quarantine" in target.parts:
            self.waits.set()
            self.free.wait(WAIT_SECONDS)
        super().rename(source, target)


async def test_what_takes_the_place_of_a_bad_file_is_not_put_away_with_it(tmp_path: Path) -> None:
    """Not even where the agent that had the bad one is gone, and another makes the same block anew."""
    files = SlowQuarantine()
    driver = await Driver.open(tmp_path, files=files, load_seconds=0.05)
    first, second = context([1] * 256), context([2] * 256)
    await driver.put("first", first)
    await driver.put("second", second)
    await driver.store.evict(TENANT, "first")
    await driver.store.evict(TENANT, "second")
    damage_all(tmp_path)
    await driver.reuse("first", first)  # without its KV, for which it doesn't wait so long
    assert await asyncio.to_thread(files.waits.wait, WAIT_SECONDS)
    await driver.reuse("second", second)  # whose bad file has to wait behind that one
    await eventually(lambda: driver.store.stats().quarantined == 2)
    assert await driver.store.delete(TENANT, "second")
    await eventually(lambda: len(driver.store.core.index.nodes) == 1)
    anew = asyncio.create_task(compute(driver, "third", second))
    await asyncio.wait([anew], timeout=0.5)  # it may be put in place now, or wait until the bad one is away
    files.free.set()
    assert (await anew).persisted
    await driver.store.settled()
    await driver.close()
    driver = await Driver.open(tmp_path)
    reuse = await driver.reuse("third", second)
    assert (reuse.source, reuse.length, reuse.fallback) == (Source.WARM, 256, None)
    await driver.close()


async def test_a_commit_waits_until_the_names_of_files_that_another_made_are_synced(tmp_path: Path) -> None:
    files = NamedFiles()
    driver = await Driver.open(tmp_path, files=files)
    files.hold.clear()
    first = asyncio.create_task(driver.put("a", TOKENS))
    await asyncio.to_thread(files.held.wait, WAIT_SECONDS)
    assert (await compute(driver, "b", TOKENS)).persisted
    assert not files.unsynced
    files.hold.set()
    await first
    await driver.close()


async def test_what_is_durable_after_all_has_every_name_synced(tmp_path: Path) -> None:
    files = NamedFiles()
    driver = await Driver.open(tmp_path, files=files, io_threads=1)
    files.good = 2
    _, committed = await driver.put("a", TOKENS)
    assert not committed.persisted
    assert files.unsynced
    files.good = None
    await eventually(lambda: not driver.store.stats().not_durable)
    assert not files.unsynced
    await driver.close()


def outcome(name: str) -> RequestOutcome:
    return RequestOutcome(name, b"h", b"answer")


async def test_an_outcome_that_the_disk_refused_is_written_with_the_next_commit_of_its_agent(tmp_path: Path) -> None:
    files = NamedFiles()
    driver = await Driver.open(tmp_path, files=files, retry_seconds=ENDLESS)
    files.good = 0
    await driver.put("a", context(300), request=outcome("first"))
    files.good = None
    _, committed = await driver.put("a", context(400), request=outcome("second"))
    assert committed.persisted
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert [await driver.store.outcome(TENANT, name) for name in ("first", "second")] == [
        outcome("first"),
        outcome("second"),
    ]
    await driver.close()


async def test_an_outcome_is_never_written_before_its_commit(tmp_path: Path) -> None:
    files = NamedFiles()
    driver = await Driver.open(tmp_path, files=files, retry_seconds=ENDLESS)
    files.good = 0
    await driver.put("a", context(300), request=outcome("of a"))
    await driver.put("b", context([1] * 300), request=outcome("of b"))
    files.good = 2  # as many as the first agent has
    assert not await driver.store.flush()
    assert driver.store.stats().not_durable == 1
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert [record.agent_id for record in driver.store.agents(TENANT)] == ["a"]
    assert await driver.store.outcome(TENANT, "of a") == outcome("of a")
    assert await driver.store.outcome(TENANT, "of b") is None
    await driver.close()


async def test_who_is_wanted_after_all_while_others_expire_lives_on(tmp_path: Path) -> None:
    files = NamedFiles()
    driver = await Driver.open(tmp_path, files=files)
    await driver.put("d", context([0] * 300))
    with contextlib.ExitStack() as leases:
        for agent in "abc":
            tokens = context([ord(agent)] * 300)
            await driver.put(agent, tokens)
            leases.enter_context(driver.store.resolve(TENANT, agent, tokens, 300))
            await driver.store.update(TENANT, agent, ttl=1e-6)
        await driver.store.settled()
        files.hold.clear()
    await asyncio.to_thread(files.held.wait, WAIT_SECONDS)  # one is being deleted, and the others are due
    await driver.store.update(TENANT, "b", ttl=None)
    await driver.store.delete(TENANT, "c")
    await driver.put("c", context([1] * 300))
    files.hold.set()
    await eventually(lambda: driver.store.agent(TENANT, "a") is None)
    await driver.put("d", context([0] * 400))
    await driver.store.settled()
    assert [record.agent_id for record in driver.store.agents(TENANT)] == ["b", "c", "d"]
    await driver.close()


async def test_uses_whose_writing_is_cut_short_are_written_at_the_end(tmp_path: Path) -> None:
    machine = Machine()
    driver = await Driver.open(tmp_path, times=machine.times)
    await driver.put("a", context(300))
    await driver.put("due", context([1] * 300))
    machine.pass_time(30.0)
    await driver.reuse("a", context(300))
    database, apply = driver.store.core.journal.database, driver.store.core.journal.database.apply
    busy, free = threading.Event(), threading.Event()

    def slow(statements: Sequence[Statement], number: int | None = None) -> None:
        busy.set()
        free.wait(WAIT_SECONDS)
        apply(statements, number)

    with driver.store.resolve(TENANT, "due", context([1] * 300), 300):  # it is due, and can't go: upkeep looks often
        await driver.store.update(TENANT, "due", ttl=1e-6)
        used = {record.agent_id: record.last_used_time for record in driver.store.agents(TENANT)}
        database.apply = slow  # type: ignore[method-assign]
        changing = asyncio.create_task(driver.store.update(TENANT, "a", labels={"k": "v"}))
        assert await asyncio.to_thread(busy.wait, WAIT_SECONDS)
        machine.pass_time(60.0)
        await eventually(lambda: not driver.store.core.used)  # they wait to be written behind that change
        closing = asyncio.create_task(driver.close())
        await asyncio.sleep(0)  # the end has begun, and with it nothing of upkeep's goes on
        free.set()
        await asyncio.gather(changing, closing)
    driver = await Driver.open(tmp_path, times=machine.times)
    assert driver.store.agent(TENANT, "a") is not None
    assert [r.last_used_time for r in driver.store.agents(TENANT) if r.agent_id == "a"] == [used["a"]]
    await driver.close()


async def test_whoever_waits_for_a_manifest_is_told_when_its_agent_is_deleted_instead(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, manifest_seconds=ENDLESS)
    await driver.put("a", context(300))
    await eventually(lambda: (TENANT, "a") in driver.store.core.manifest_sizes)
    await driver.put("a", context(400))  # its manifest has to wait for the pause to be over
    manifests, agent = driver.store.manifests, driver.store.core.existing(TENANT, "a")
    agent.deleting = True
    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(manifests.flush(), manifests.remove(agent))
    agent.deleting = False
    await driver.store.delete(TENANT, "a")
    await driver.close()


async def test_a_fork_of_a_fork_keeps_a_length_once(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, LAYOUTS["window"])
    await driver.put("0", context(300), keep=[299, 300])
    for number in range(4):
        await driver.store.fork(TENANT, str(number), str(number + 1))
    assert driver.store.core.existing(TENANT, "4").kept == (299, 300)
    await driver.close()


async def test_a_ram_copy_whose_file_is_gone_stays_where_the_disk_refuses_a_new_one(tmp_path: Path) -> None:
    files, tokens = NamedFiles(), context([0] * 1000)
    driver = await Driver.open(tmp_path, files=files, disk_bytes=3_000_000, retry_seconds=ENDLESS)
    await driver.put("0", tokens)
    first = driver.store.core.existing(TENANT, "0").nodes[0]
    for number in range(1, 40):
        await driver.put(str(number), context([number] * 1000))
        if not first.parts:  # the quota has taken its files
            break
    assert not first.parts
    files.good = 0
    _, committed = await driver.put("0", context(tokens.tolist(), [5] * 10))
    assert not committed.persisted
    for _ in range(20):
        driver.store.relieve()
    reuse = await driver.reuse("0", context(tokens.tolist(), [5] * 10))
    assert (reuse.source, reuse.length) == (Source.HOT, 1010)
    files.good = None
    await driver.close()


def test_many_bad_files_at_once_find_the_quarantine_full(tmp_path: Path) -> None:
    folder, files = tmp_path / "quarantine", Files(Durability.NONE)
    folder.mkdir()
    bad = [tmp_path / str(number) for number in range(400)]
    for path in bad:
        path.write_bytes(bytes(10))
    with ThreadPoolExecutor(4) as threads:
        kept = list(threads.map(lambda path: quarantine(files, path, folder, 50), bad))
    assert max(kept) <= 50
    assert len(list(folder.iterdir())) <= 5
    assert not any(path.exists() for path in bad)
