"""How much KV may be in RAM for requests that are loading, waiting for the engine, or running.

The engine bounds what it computes with; this bounds what is handed to it. Without it, every request that waits for the
engine would hold its whole loaded context.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from warmkv_server.errors import QueueFull


class Admission:
    """Lets requests in, in order of arrival, while their bytes fit. One alone is always let in.

    Args:
        budget: bytes of all that are in.
        max_waiting: requests that may wait.
    """

    def __init__(self, budget: int, max_waiting: int) -> None:
        self._budget = budget
        self._max_waiting = max_waiting
        self._held: list[int] = []
        self._line: deque[tuple[int, asyncio.Event]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @asynccontextmanager
    async def hold(self, nbytes: int) -> AsyncIterator[None]:
        """Wait until so many bytes fit, and hold them for the block.

        Raises:
            QueueFull: if too many wait already.
        """
        if self._line or not self._fits(nbytes):
            await self._wait(nbytes)
        else:
            self._held.append(nbytes)
        try:
            yield
        finally:
            self._held.remove(nbytes)
            self._admit()

    async def _wait(self, nbytes: int) -> None:
        if len(self._line) >= self._max_waiting:
            raise QueueFull(
                f"{len(self._line)} requests wait for memory, the most this server allows; try again", retry_after=1.0
            )
        place = nbytes, asyncio.Event()
        self._line.append(place)
        try:
            await place[1].wait()
        except asyncio.CancelledError:
            if place[1].is_set():  # let in and given up at once
                self._held.remove(nbytes)
            else:
                self._line.remove(place)
            self._admit()
            raise

    def _fits(self, nbytes: int) -> bool:
        return not self._held or sum(self._held) + nbytes <= self._budget

    def _admit(self) -> None:
        while self._line and self._fits(self._line[0][0]):
            nbytes, let_in = self._line.popleft()
            self._held.append(nbytes)
            let_in.set()
