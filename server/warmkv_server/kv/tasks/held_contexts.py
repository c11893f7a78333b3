"""Whose KV is at hand, told to whoever wants to follow it, such as a router.

Nothing is queued: of each context the reader is told how it is when it reads, if that differs from what it was told
before. So a reader that is slow misses what was in between, and no more is kept for it than what it was told, and which
contexts have changed; where these are many, it is told everything anew.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import numpy as np

from warmkv_server.contract.store import HeldChange, HeldSnapshot
from warmkv_server.kv.index.index import Agent
from warmkv_server.kv.index.records import TokenIds
from warmkv_server.kv.tasks.core import Core

MOST_CHANGED = 4096
"""Contexts that have changed since the reader last read; beyond that, it is told everything anew."""
_AT_ONCE = 256
"""Contexts that are looked at before others have their turn on the event loop."""
_NOTHING: TokenIds = np.zeros(0, np.int32)


class HeldContexts:
    """An asynchronous iterator for one reader, on the event loop: first a `HeldSnapshot`, then each `HeldChange`, and a
    `HeldSnapshot` again where there were too many. Contexts of hidden agents are among them, those of other models not.

    Left as a context manager, or closed, it ends.
    """

    def __init__(self, core: Core, tenant: str) -> None:
        self._core = core
        self._tenant = tenant
        self._told: dict[int, TokenIds] = {}
        self._changed: dict[Agent, None] | None = None
        """None: everything may have."""
        self._news = asyncio.Event()
        self._closed = False
        core.accounts.watchers.append(self._note)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._core.accounts.watchers.remove(self._note)
            self._told.clear()
            self._changed = {}
            self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> HeldSnapshot | HeldChange:
        while not self._closed:
            if self._changed is None:
                return await self._snapshot()
            while self._changed:
                agent = next(iter(self._changed))
                del self._changed[agent]
                change = self._change(agent)
                if change is not None:
                    return change
            self._news.clear()
            await self._news.wait()
        raise StopAsyncIteration

    def _note(self, agent: Agent) -> None:
        """Something of it has changed."""
        if agent.tenant != self._tenant or self._changed is None:
            return
        self._changed[agent] = None
        if len(self._changed) > MOST_CHANGED:
            self._changed = None
        self._news.set()

    async def _snapshot(self) -> HeldSnapshot:
        self._told, self._changed = {}, {}
        for number, agent in enumerate(list(self._core.index.agents.values()), 1):
            if agent.tenant == self._tenant:
                held = self._held(agent)
                if len(held):
                    self._told[agent.incarnation] = held
            if number % _AT_ONCE == 0:
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    self._changed = None  # nobody is told this one
                    raise
        return HeldSnapshot(dict(self._told))

    def _change(self, agent: Agent) -> HeldChange | None:
        before, after = self._told.get(agent.incarnation, _NOTHING), self._held(agent)
        if np.array_equal(before, after):
            return None
        if len(after):
            self._told[agent.incarnation] = after
        else:
            del self._told[agent.incarnation]
        return HeldChange(agent.incarnation, before, after)

    def _held(self, agent: Agent) -> TokenIds:
        """Its tokens as far as their KV is at hand; none where it is gone."""
        core = self._core
        if core.index.agents.get(agent.key) is not agent or agent.fingerprint != core.fingerprint:
            return _NOTHING
        for node in agent.nodes:
            if not all(core.has(node, kind) for kind in core.layout.everywhere):
                return agent.tokens[: node.start]
        return agent.tokens
