"""A takeover that is killed at each of its steps, and goes on; run by tests/kv/test_takeover.py.

    python -m tests.version_1.kill DIRECTORY

Both the victim and the judge are forked from this process, which has imported everything and used nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from tests.kv.driver import TENANT, Driver
from tests.kv.words import LAYOUTS, context
from tests.version_1.directories import unpack
from warmkv_server.contract.kv import Source
from warmkv_server.contract.store import Durability
from warmkv_server.kv.blocks.files import Files

LAYOUT = LAYOUTS["everything"]
MOST_STEPS = 200


class DeadlyFiles(Files):
    """Real files, until a step after which there is no process any more."""

    def __init__(self, steps: int) -> None:
        super().__init__(Durability.FSYNC)
        self._left = steps

    def _step(self) -> None:
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def write(self, path: Path, buffers: Sequence[memoryview]) -> int:
        self._step()
        return super().write(path, buffers)

    def link(self, source: Path, target: Path) -> None:
        self._step()
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)

    def sync_folder(self, folder: Path) -> None:
        self._step()
        super().sync_folder(folder)


async def take_over(data_dir: Path, steps: int) -> None:
    driver = await Driver.open(data_dir, LAYOUT, files=DeadlyFiles(steps))
    await driver.close()


async def judge(data_dir: Path) -> None:
    driver = await Driver.open(data_dir, LAYOUT)
    for agent in ("a", "fork"):
        reuse = await driver.reuse(agent, context(300))
        assert (reuse.source, reuse.length, reuse.fallback) == (Source.WARM, 300, None), reuse
        await driver.store.evict(TENANT, agent)
    assert await driver.store.outcome(TENANT, "request") is not None
    await driver.close()


def forked(work: Callable[[], None]) -> int:
    """The wait status of a child that did it."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def version_of(data_dir: Path) -> int:
    with closing(sqlite3.connect(data_dir / "index.sqlite")) as index:
        return int(index.execute("PRAGMA user_version").fetchone()[0])


def main() -> None:
    folder = Path(sys.argv[1])
    for steps in range(MOST_STEPS):
        data_dir = unpack("store", folder / str(steps))
        old = {path: path.read_bytes() for path in data_dir.glob("blocks/*/*")}
        status = forked(lambda data=data_dir, n=steps: asyncio.run(take_over(data, n)))  # type: ignore[misc]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
        if status and version_of(data_dir) == 1:  # then a server of format 1 has all that it had
            assert {path: path.read_bytes() for path in old} == old
        assert forked(lambda data=data_dir: asyncio.run(judge(data))) == 0, steps  # type: ignore[misc]
        if not status:
            print(f"killed at {steps} steps")
            return
    raise AssertionError("it never came to an end")


if __name__ == "__main__":
    main()
