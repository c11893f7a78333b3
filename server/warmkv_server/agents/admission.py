"""Admission by memory: how much KV may be in RAM for requests that are loading, waiting for the engine, or running.

The engine bounds what it computes with; this bounds what is handed to it. Without it, every request that waits for the
engine would hold its whole loaded context.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from warmkv_server.contract.fairness import Bound, FairLine
from warmkv_server.errors import QueueFull

_OVER = 2
"""What tenants hold within their shares may come to so many times the budget: nobody who is in can be put out again."""


class Admission:
    """Lets requests in while their bytes fit. One alone is always let in.

    The tenant that holds least comes first, among equals they take turns, and each has its order of arrival. What is
    free goes to whoever is first. Each tenant may have an equal share of the budget, also where others hold all of it,
    and the first more than that where the others have no more than theirs: in all, up to twice the budget. A tenant
    alone has the budget.

    Args:
        budget: bytes of all that are in.
        bound: on the requests that wait.
    """

    def __init__(self, budget: int, bound: Bound) -> None:
        self._budget = budget
        self._bound = bound
        self._held: Counter[str] = Counter()
        self._inside: Counter[str] = Counter()
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
            self._enter(nbytes, tenant)
        try:
            yield
        finally:
            self._leave(nbytes, tenant)

    async def _wait(self, nbytes: int, tenant: str) -> None:
        if self._bound.refuses(len(self._line), self._line.held_by(tenant)):
            raise QueueFull(
                f"{len(self._line)} requests wait for memory, the most this server allows; try again",
                retry_after=1.0,
                limit=self._bound.most,
                actual=len(self._line),
                unit="requests",
            )
        place = nbytes, asyncio.Event()
        self._line.join(tenant, place)
        self._admit()  # within its share, perhaps
        try:
            await place[1].wait()
        except asyncio.CancelledError:
            if place[1].is_set():  # let in and given up at once
                self._leave(nbytes, tenant)
            else:
                self._line.remove(place)
                self._admit()
            raise

    def _enter(self, nbytes: int, tenant: str) -> None:
        self._held[tenant] += nbytes
        self._inside[tenant] += 1

    def _leave(self, nbytes: int, tenant: str) -> None:
        self._held[tenant] -= nbytes
        self._inside[tenant] -= 1
        if not self._inside[tenant]:
            del self._held[tenant], self._inside[tenant]
        self._admit()

    def _fits(self, nbytes: int) -> bool:
        return not self._inside or self._held.total() + nbytes <= self._budget

    def _fits_beside_shares(self, nbytes: int, tenant: str) -> bool:
        """Whether it fits as far as its own tenant is concerned, and no other holds more than its share."""
        others = [held for other, held in self._held.items() if other != tenant]
        return self._held[tenant] + nbytes <= self._budget and max(others, default=0) <= self._share

    def _fits_share(self, nbytes: int, tenant: str) -> bool:
        return self._held[tenant] + nbytes <= self._share and self._held.total() + nbytes <= _OVER * self._budget

    @property
    def _share(self) -> int:
        """Bytes that each tenant may have of those that hold or wait."""
        return self._budget // max(1, len(self._inside.keys() | self._line.tenants()))

    def _may_enter(self, nbytes: int, tenant: str, *, is_first: bool) -> bool:
        if is_first and (self._fits(nbytes) or self._fits_beside_shares(nbytes, tenant)):
            return True
        return self._fits_share(nbytes, tenant)

    def _admit(self) -> None:
        while self._line:
            firsts = self._line.firsts(lambda tenant: self._held[tenant])
            for tenant, place in firsts:
                nbytes, let_in = place
                if self._may_enter(nbytes, tenant, is_first=place is firsts[0][1]):
                    self._line.take(place)
                    self._enter(nbytes, tenant)
                    let_in.set()
                    break
            else:
                return
