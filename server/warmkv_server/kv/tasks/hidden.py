"""The bounds of hidden agents: what goes when a context that goes on with another is there, or when they have too much.

The time that each may live is its ttl, which is kept as any agent's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from warmkv_server.contract.names import AgentKey
from warmkv_server.errors import StorageUnavailable
from warmkv_server.kv.index.index import Agent
from warmkv_server.kv.index.likeness import beginnings
from warmkv_server.kv.tasks.core import Core

log = logging.getLogger(__name__)


class HiddenBounds:
    """Used on the event loop's thread."""

    def __init__(self, core: Core, delete: Callable[[str, str], Awaitable[bool]]) -> None:
        """
        Args:
            delete: removes an agent durably.
        """
        self._core = core
        self._delete = delete
        self._hidden = core.index.hidden
        self._turn = asyncio.Lock()
        """One after another: what one is about to delete, the next need not delete again."""

    async def after_start(self) -> None:
        """Delete what a crash, or another limit, has left."""
        agents = self._hidden.by_last_use()
        async with self._turn:
            for agent in reversed(agents):
                await self._remove(beginnings(self._core.index, agent) if self._is_there(agent) else ())
            await self._keep_limit()

    async def after_commit(self, key: AgentKey) -> None:
        """Delete those that the new one goes on with, and those that are too much."""
        async with self._turn:
            agent = self._core.index.agents.get(key)
            if agent is not None:
                await self._remove(beginnings(self._core.index, agent))
                if agent.warm_bytes - agent.shared_bytes > self._limit:  # others need not go for it
                    await self._remove([agent])
            await self._keep_limit()

    async def before_commit(self) -> None:
        """Wait while there is too much, so that whoever asks fastest can't have more than the limit for long."""
        if self._excess() > 0:
            async with self._turn:
                await self._keep_limit()

    async def shed(self, nbytes: int) -> bool:
        """Delete as many as have so many bytes, for others. Whether one went; its files do so by and by."""
        left = self._hidden.nbytes.total() - nbytes
        went = False
        while self._hidden.nbytes.total() > left and (agent := self._hidden.oldest_of_richest()) is not None:
            if not await self._remove([agent]):
                break
            went = True
        return went

    @property
    def _limit(self) -> int:
        return self._core.settings.anonymous_bytes

    def _excess(self) -> int:
        return self._hidden.nbytes.total() - self._limit

    async def _keep_limit(self) -> None:
        if (excess := self._excess()) > 0:
            await self.shed(excess)

    async def _remove(self, agents: Iterable[Agent]) -> bool:
        """False if the disk refuses: what is left goes with the next, or when its time is up."""
        try:
            for agent in agents:
                await self._delete(*agent.key)
        except StorageUnavailable as error:
            log.warning("contexts of requests without an agent can't be deleted: %s", error)
            return False
        return True

    def _is_there(self, agent: Agent) -> bool:
        return self._core.index.agents.get(agent.key) is agent
