"""The durable log of the index: the database with its thread, and the log of commits beside it.

One transaction is the commit point of everything the store does. A single thread owns the connection, so transactions
happen in the order in which they were submitted.
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from warmkv_server.contract.names import AgentKey
from warmkv_server.kv.blocks.files import InFlight
from warmkv_server.kv.catalog.commit_log import CommitLog, RecordOf
from warmkv_server.kv.catalog.database import Database, Statement


class Journal:
    """The database with its thread, and the log of commits beside it. Used on the event loop's thread.

    Attributes:
        durable: number of the last transaction that is on disk.
    """

    def __init__(self, database: Database, commits: CommitLog) -> None:
        self.database = database
        self.in_flight = InFlight()
        self.commits = commits
        self.durable = self._submitted = database.number
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-journal")

    async def apply(self, statements: Sequence[Statement], record: RecordOf | None = None) -> None:
        """See `Database.apply`. Submitted before this first awaits, so the order of calls is the order of commits.

        Args:
            record: what the transaction makes of an agent, for the log of commits; called at once.
        """
        await self._run(self.database.apply, statements, record)

    async def remove(self, statements: Sequence[Statement], record: RecordOf | None = None) -> None:
        """See `Database.remove`, and `apply` above."""
        await self._run(self.database.remove, statements, record)

    async def query(self, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Look at what the transactions submitted so far have left.

        Raises:
            OSError: the index can't be read.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.database.query, sql, parameters)
        except sqlite3.DatabaseError as error:
            raise OSError(errno.EIO, f"the index can't be read: {error}") from error

    async def cover(self, written: Mapping[AgentKey, int]) -> None:
        """See `CommitLog.cover`."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.commits.cover, written)

    async def _run(
        self, work: Callable[[Sequence[Statement], int], None], statements: Sequence[Statement], record: RecordOf | None
    ) -> None:
        self._submitted = number = self._submitted + 1
        entry = None if record is None else record(number)

        def run() -> None:
            work(statements, number)
            if entry is not None:
                self.commits.append(number, entry)

        await asyncio.get_running_loop().run_in_executor(self._thread, self.in_flight.run, run)
        self.durable = max(self.durable, number)

    async def close(self) -> None:
        def close() -> None:
            self.database.close()
            self.commits.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, self.in_flight.run, close)
        self._thread.shutdown()
