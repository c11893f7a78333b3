"""The disk quota: which blocks are evicted from disk when the directory is full.

Everything under the data directory counts. Hidden agents go before anybody else loses something. Tenants share it: what
goes is of those that have more than their equal share, of the one with the most first. Of a tenant, least recently used
blocks go first, the end of a context before its start (using a block uses all before it, so a start is never older than
what follows it); never what a request is working with. What a pinned agent references stays, unless its tenant has more
than its share, and another, which has less than its own, needs room. An agent keeps its tokens: what is gone is
computed anew when needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from heapq import heapify, heappop

from warmkv_server.contract.kv import Fallback
from warmkv_server.kv.index.index import Node
from warmkv_server.kv.tasks.collect import Collector
from warmkv_server.kv.tasks.core import Core
from warmkv_server.kv.tasks.manifests import Manifests

log = logging.getLogger(__name__)

_MARGIN = 256 << 10
"""Bytes left for the index's next transactions."""
_SLACK = 20
"""A twentieth of the quota is freed on top of what is needed, so that not every commit has to look."""


class Room:
    """Bytes of the quota that a commit may write yet."""

    def __init__(self, reserved: Counter[str], tenant: str, nbytes: int) -> None:
        self._reserved = reserved
        self._tenant = tenant
        self._left = nbytes
        reserved[tenant] += nbytes

    def spend(self, nbytes: int) -> None:
        """So many of them are files now, and counted as such."""
        nbytes = min(nbytes, self._left)
        self._left -= nbytes
        self._reserved[self._tenant] -= nbytes

    def release(self) -> None:
        self.spend(self._left)


class Quota:
    def __init__(
        self, core: Core, collector: Collector, manifests: Manifests, shed: Callable[[int], Awaitable[bool]]
    ) -> None:
        """
        Args:
            shed: deletes hidden agents that have as many bytes, as far as there are any. Whether one went.
        """
        self._core = core
        self._shed = shed
        self._collector = collector
        self._manifests = manifests
        self._reserved: Counter[str] = Counter()
        self._freeing = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def room(self, tenant: str, nbytes: int, *, hidden: bool = False) -> AsyncIterator[Room]:
        """Have so many bytes of the quota for the block.

        Args:
            hidden: whether a hidden agent asks, for whom others lose nothing.

        Raises:
            OSError: they can't be had.
        """
        if self._excess(nbytes) > 0:
            async with self._freeing:  # One after another: what one is freeing, the next need not free again.
                while (excess := self._excess(nbytes)) > 0:
                    if await self._shed(excess):
                        await self._collector.idle()
                    elif hidden:
                        raise OSError(errno.EDQUOT, "the disk quota has no room for a hidden agent")
                    else:
                        await self._free(tenant, nbytes, excess)
        room = Room(self._reserved, tenant, nbytes)
        try:
            yield room
        finally:
            room.release()

    def _excess(self, nbytes: int) -> int:
        """By how much the quota would be exceeded with so many bytes more."""
        limit = self._core.settings.disk_bytes
        return self._core.disk_bytes + self._reserved.total() + nbytes + _MARGIN - limit if limit else 0

    async def _free(self, tenant: str, nbytes: int, excess: int) -> None:
        victims, freed = self._victims(tenant, nbytes, excess)
        limit = self._core.settings.disk_bytes
        if freed < excess:
            raise OSError(
                errno.EDQUOT, f"the disk quota of {limit} bytes is used up by pinned agents and running requests"
            )
        log.info("the disk quota takes %d blocks with %d bytes", len(victims), freed)

        async def keep_tokens() -> None:
            self._manifests.note_lost(victims)
            await self._manifests.flush()

        await self._collector.drop_files(victims, Fallback.MISSING_BLOCK, keep_tokens)

    def _victims(self, tenant: str, nbytes: int, excess: int) -> tuple[list[Node], int]:
        """What is to go so that a tenant can have so many bytes, and the bytes of it: fewer than the excess where there
        is no more."""
        used = self._core.accounts.disk + self._reserved
        used[tenant] += nbytes
        share = max(used.total() - excess, 0) // len(used)
        in_need = used[tenant] <= share
        slack = self._core.settings.disk_bytes // _SLACK
        victims: list[Node] = []
        freed = 0
        for pinned in (False, True):
            lines = self._lines(pinned=pinned)
            if pinned:  # of others, for one that has less than its share, and no more than it needs
                slack = 0
                lines = {each: line for each, line in lines.items() if in_need and each != tenant}
            while freed < excess + slack:
                rich = [each for each in lines if used[each] > share]
                if not rich and tenant in lines and used[tenant] > share - slack:
                    rich = [tenant]
                if not rich:
                    break
                richest = max(rich, key=lambda each: used[each])
                node = heappop(lines[richest])[-1]
                if not lines[richest]:
                    del lines[richest]
                victims.append(node)
                used[richest] -= node.disk_bytes
                freed += node.disk_bytes
        return victims, freed

    def _lines(self, *, pinned: bool) -> dict[str, list[tuple[float, int, int, Node]]]:
        """What can go, by tenant, as heaps; first what goes first."""
        lines: defaultdict[str, list[tuple[float, int, int, Node]]] = defaultdict(list)
        for node in self._core.index.nodes.values():
            if node.parts and not node.pins and bool(node.pinned_refs) == pinned:
                lines[node.tenant].append((node.last_used, -node.end, node.row, node))
        for line in lines.values():
            heapify(line)
        return lines
