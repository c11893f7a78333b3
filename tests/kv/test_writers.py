"""How many files are written at once, and in which pieces."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.kv.driver import Driver
from tests.kv.words import context
from warmkv_server.contract.store import Durability
from warmkv_server.kv.blocks.files import Files

WAIT_SECONDS = 60.0
SUFFIX = ".safetensors"


class CountingFiles(Files):
    """Real files; knows how many block files were being written at once.

    Attributes:
        meet: how many writers wait for each other, once, before they write.
    """

    def __init__(self, meet: int = 1, busy: Callable[[], bool] = lambda: False) -> None:
        super().__init__(Durability.NONE, busy=busy)
        self.most = 0
        self._now = 0
        self.meet = meet
        self._lock = threading.Condition()

    def write(self, path: Path, buffers: Sequence[memoryview]) -> int:
        if path.suffix != SUFFIX:
            return super().write(path, buffers)
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self._lock.notify_all()
            self._lock.wait_for(lambda: self.most >= self.meet, WAIT_SECONDS)
        try:
            return super().write(path, buffers)
        finally:
            with self._lock:
                self._now -= 1


async def test_files_of_a_commit_are_written_several_at_once(tmp_path: Path) -> None:
    files = CountingFiles(meet=4)
    driver = await Driver.open(tmp_path, files=files, io_threads=4)
    await driver.put("a", context(256 * 8))
    assert files.most == 4
    await driver.close()


async def test_while_somebody_decodes_large_commits_go_one_by_one_and_a_turn_goes_at_once(tmp_path: Path) -> None:
    files = CountingFiles(busy=lambda: True)
    driver = await Driver.open(tmp_path, files=files, io_threads=4)
    await driver.put("a", context(256 * 8))
    assert files.most == 1
    files.meet = 3
    await driver.put("b", context([1] * 600))
    assert files.most == 3
    await driver.close()


class OneAtATime(Files):
    """Real files; no small commit's block is written before the next small commit has come to write, so that there is
    always one."""

    def __init__(self) -> None:
        super().__init__(Durability.NONE, busy=lambda: True)
        self.waiting = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)
        self.large = threading.Event()

    def write(self, path: Path, buffers: Sequence[memoryview]) -> int:
        if path.suffix == SUFFIX:
            if sum(len(buffer) for buffer in buffers) < 100 * 288:
                self.waiting.release()
                assert self.let_go.acquire(timeout=WAIT_SECONDS)
            else:
                self.large.set()
        return super().write(path, buffers)


async def test_a_large_commit_goes_on_beside_steady_small_ones(tmp_path: Path) -> None:
    files = OneAtATime()
    driver = await Driver.open(tmp_path, files=files, io_threads=4)
    small = asyncio.create_task(driver.put("0", context([0] * 10)))
    await asyncio.to_thread(files.waiting.acquire, timeout=WAIT_SECONDS)
    large = asyncio.create_task(driver.put("large", context([1000] * 256 * 8)))
    for number in range(1, 30):  # another has always begun before one is done
        following = asyncio.create_task(driver.put(str(number), context([number] * 10)))
        await asyncio.to_thread(files.waiting.acquire, timeout=WAIT_SECONDS)
        files.let_go.release()
        await small
        small = following
    assert large.done()
    files.let_go.release()
    await asyncio.gather(small, large)
    await driver.close()


def test_pieces_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [3 << 20, 0, 7, (256 << 10) - 7, 12, 1]
    content = np.random.default_rng(0).bytes(sum(sizes))
    ends = list(itertools.accumulate(sizes))
    buffers = [memoryview(content)[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    pieces: list[int] = []
    writev = os.writev

    def counted(fd: int, given: Sequence[memoryview]) -> int:
        # As if the disk took less than it was given, now and then.
        pieces.append(sum(len(buffer) for buffer in given))
        return writev(fd, given if len(pieces) % 2 else [given[0][: len(given[0]) // 2 + 1]])

    monkeypatch.setattr(os, "writev", counted)
    files = Files(Durability.NONE)
    for busy in (False, True):
        pieces.clear()
        files.busy = lambda busy=busy: busy  # type: ignore[misc]
        assert files.write(tmp_path / str(busy), buffers) == len(content)
        assert (tmp_path / str(busy)).read_bytes() == content
        assert (max(pieces) > 256 << 10) != busy


async def test_two_large_commits_share_the_one_writer(tmp_path: Path) -> None:
    files = CountingFiles(busy=lambda: True)
    driver = await Driver.open(tmp_path, files=files, io_threads=4)
    async with asyncio.TaskGroup() as commits:
        for number in range(3):
            commits.create_task(driver.put(str(number), context([number] * 256 * 6)))
    assert files.most == 1
    await driver.close()


async def test_a_commit_hurries_when_nobody_decodes_any_more(tmp_path: Path) -> None:
    asked = 0

    def busy() -> bool:
        nonlocal asked
        asked += 1
        if asked > 4:
            files.meet = 4
        return asked <= 4

    files = CountingFiles(busy=busy)
    driver = await Driver.open(tmp_path, files=files, io_threads=4)
    await driver.put("a", context(256 * 12))
    assert files.most == 4
    await driver.close()
