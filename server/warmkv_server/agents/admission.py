"""How much KV may be in RAM for requests that are loading, waiting for the engine, or running.

The engine bounds what it computes with; this bounds what is handed to it. Without it, every request that waits for the
engine would hold its whole loaded context.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from warmkv_server.engine.fairness import Bound, FairLine
from warmkv_server.errors import QueueFull


class Admission:
    """Lets requests in while their bytes fit: tenants take turns, each in order of arrival. One alone is always let in.

    Args:
        budget: bytes of all that are in.
        bound: on the requests that wait.
    """

    def __init__(self, budget: int, bound: Bound) -> None:
        self._budget = budget
        self._bound = bound
        self._held: list[int] = []
        self._line: FairLine[tuple[int, asyncio.Event]] = FairLine()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @asynccontextmanager
    async def hold(self, nbytes: int, tenant: str) -> AsyncIterator[None]:
        """Wait until so many bytes fit, and hold them for the block.

        Raises:
            QueueFull: if too many wait already.
        """
        if self._line or not self._fits(nbytes):
            await self._wait(nbytes, tenant)
        else:
            self._held.append(nbytes)
        try:
            yield
        finally:
            self._held.remove(nbytes)
            self._admit()

    async def _wait(self, nbytes: int, tenant: str) -> None:
        if self._bound.refuses(len(self._line), self._line.held_by(tenant)):
            raise QueueFull(
                f"{len(self._line)} requests wait for memory, the most this server allows; try again", retry_after=1.0
            )
        place = nbytes, asyncio.Event()
        self._line.join(tenant, place)
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
        while self._line and self._fits(self._line.first[0]):
            nbytes, let_in = self._line.take()
            self._held.append(nbytes)
            let_in.set()
