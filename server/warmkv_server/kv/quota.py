"""The disk quota: what goes when the directory is full.

Everything under the data directory counts. Least recently used blocks go first, the end of a context before its start
(using a block uses all before it, so a start is never older than what follows it); never what a pinned agent
references, nor what a request is working with. An agent keeps its tokens: what is gone is computed anew when needed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator

from warmkv_server.kv.collect import Collector
from warmkv_server.kv.core import Core
from warmkv_server.kv.index import Node
from warmkv_server.kv.manifests import Manifests
from warmkv_server.kv.types import Fallback

log = logging.getLogger(__name__)

_MARGIN = 256 << 10
"""Bytes left for the index's next transactions."""
_SLACK = 20
"""A twentieth of the quota is freed on top of what is needed, so that not every commit has to look."""


class Quota:
    def __init__(self, core: Core, collector: Collector, manifests: Manifests) -> None:
        self._core = core
        self._collector = collector
        self._manifests = manifests
        self._reserved = 0

    @contextlib.asynccontextmanager
    async def room(self, nbytes: int) -> AsyncIterator[None]:
        """Have so many bytes of the quota for the block.

        Raises:
            OSError: they can't be had.
        """
        limit = self._core.settings.disk_bytes
        self._reserved += nbytes
        try:
            excess = self._core.disk_bytes + self._reserved + _MARGIN - limit
            if limit and excess > 0:
                await self._free(excess)
            yield
        finally:
            self._reserved -= nbytes

    async def _free(self, excess: int) -> None:
        limit = self._core.settings.disk_bytes
        candidates = [n for n in self._core.index.nodes.values() if n.parts and not n.pins and not n.pinned_refs]
        candidates.sort(key=lambda node: (node.last_used, -node.end))
        victims: list[Node] = []
        freed = 0
        for node in candidates:
            if freed >= excess + limit // _SLACK:
                break
            victims.append(node)
            freed += node.disk_bytes
        if freed < excess:
            raise OSError(
                errno.EDQUOT, f"the disk quota of {limit} bytes is used up by pinned agents and running requests"
            )
        log.info("the disk quota takes %d blocks with %d bytes", len(victims), freed)

        async def keep_tokens() -> None:
            self._manifests.note_lost(victims)
            await self._manifests.flush()

        await self._collector.drop_files(victims, Fallback.MISSING_BLOCK, keep_tokens)
