"""What happens at the same moment: commits of one context, a use beside an expiry, a deletion beside a manifest."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.kv.disk import RefusingFiles
from tests.kv.driver import TENANT, Driver, eventually
from tests.kv.test_limits import damage_all
from tests.kv.words import context, grow
from warmkv_server.kv.records import Commit, Committed, Durability, TokenIds
from warmkv_server.kv.types import Reuse

TOKENS = context(1000)
WAIT_SECONDS = 10.0


class NamedFiles(RefusingFiles):
    """Real files; knows which names of blocks a power cut could take back.

    Attributes:
        hold: while it is clear, the first folder to be synced waits.
        good: blocks until the disk is full.
    """

    def __init__(self) -> None:
        super().__init__(Durability.FSYNC)
        self.unsynced: set[Path] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.held = threading.Event()
        self.good: int | None = None
        self._lock = threading.Lock()

    def fill(self, fd: int, buffers: Sequence[memoryview]) -> None:
        with self._lock:
            if self.good is not None:
                self.good -= 1
                if self.good < 0:
                    self.refusal = 28  # ENOSPC
        super().fill(fd, buffers)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        with self._lock:
            if "blocks" in target.parts:
                self.unsynced.add(target)

    def sync_folder(self, folder: Path) -> None:
        if "blocks" in folder.parts and not self.held.is_set() and not self.hold.is_set():
            self.held.set()
            self.hold.wait(WAIT_SECONDS)
        with self._lock:
            before = {path for path in self.unsynced if path.parent == folder}
        super().sync_folder(folder)
        with self._lock:
            self.unsynced -= before


async def compute(driver: Driver, agent: str, tokens: TokenIds) -> Committed:
    """Make it the agent's context without reuse, as where another has committed it a moment ago."""
    with driver.store.resolve(TENANT, agent, tokens, 0) as lease:
        growth = grow(driver.layout, tokens, 0)
        return await driver.store.commit(Commit(TENANT, agent, lease.incarnation, tokens, Reuse(), growth, lease))


async def test_two_commits_that_find_one_bad_file_make_it_anew_once(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", TOKENS)
    await driver.store.evict(TENANT, "a")
    files, taken = driver.store.stats().disk_bytes, driver.store._core.block_bytes
    damage_all(tmp_path)
    done = await asyncio.gather(*(compute(driver, agent, TOKENS) for agent in "bcd"))
    assert all(committed.persisted for committed in done)
    assert driver.store._core.block_bytes == taken
    assert driver.store.stats().disk_bytes > files  # what is in quarantine
    await driver.store.evict(TENANT, "a")
    assert (await driver.reuse("d", TOKENS)).warm_tokens == 1000
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
    files.good = files.refusal = None
    await eventually(lambda: not driver.store.stats().not_durable)
    assert not files.unsynced
    await driver.close()
