"""What the store does by itself: delete agents whose time is up, write what the disk refused, forget old outcomes, and
write down when agents were used."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from warmkv_server.errors import StorageUnavailable
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.index.index import Agent
from warmkv_server.kv.tasks.collect import Collector
from warmkv_server.kv.tasks.commit import Committer
from warmkv_server.kv.tasks.core import Core
from warmkv_server.kv.tasks.manifests import Manifests

log = logging.getLogger(__name__)

_SHORTEST_PAUSE = 0.05
_LONGEST_PAUSE = 60.0
"""Seconds; also how late an old outcome may be forgotten, and a use written down."""


class Upkeep:
    """Sleeps until something is due; `wake` when what is due may have changed."""

    def __init__(
        self,
        core: Core,
        committer: Committer,
        collector: Collector,
        manifests: Manifests,
        delete: Callable[[str, str], Awaitable[bool]],
    ) -> None:
        self._core = core
        self._committer = committer
        self._collector = collector
        self._manifests = manifests
        self._delete = delete
        self._changed = asyncio.Event()
        self._retry_at: float | None = None
        self._noted_at = self._core.clock.now()
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        self._changed.set()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._note_use(closing=True)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self._expire()
                await self._forget()
                await self._retry()
                if self._core.clock.now() >= self._noted_at + _LONGEST_PAUSE:
                    await self._note_use()
                pause = self._pause()
            except Exception:
                log.exception("upkeep failed; it goes on")
                pause = _LONGEST_PAUSE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    def _pause(self) -> float:
        now = self._core.clock.now()
        times = [a.expires - now for a in self._core.index.agents.values() if a.expires is not None]
        overdue = self._core.tuning.retry_seconds  # somebody uses the agent, or the disk refuses
        times = [t if t > -_SHORTEST_PAUSE else overdue for t in times]
        if self._retry_at is not None:
            times.append(self._retry_at - now)
        return min([max(t, _SHORTEST_PAUSE) for t in times] + [_LONGEST_PAUSE])

    async def _retry(self) -> None:
        """Write what the disk refused, once the pause since the refusal, or since the last attempt, is over."""
        now = self._core.clock.now()
        if self._retry_at is not None and self._retry_at <= now:
            self._retry_at = now + self._core.tuning.retry_seconds  # also where this breaks
            await self._committer.retry_all()
            await self._collector.retry()
            await self._manifests.flush()
            self._retry_at = None
        if not self._committer.not_durable and not self._manifests.refused and not self._collector.refused:
            self._retry_at = None
        elif self._retry_at is None:
            self._retry_at = now + self._core.tuning.retry_seconds

    async def _expire(self) -> None:
        for agent in [agent for agent in self._core.index.agents.values() if self._is_due(agent)]:
            if not self._is_due(agent):  # used, or deleted and made anew, while others were deleted
                continue
            try:
                await self._delete(agent.tenant, agent.agent_id)
            except StorageUnavailable as error:
                log.warning("agent %r has expired but can't be deleted: %s", agent.agent_id, error)
                return

    def _is_due(self, agent: Agent) -> bool:
        if agent.expires is None or agent.expires > self._core.clock.now():
            return False
        at_work = agent.leases or agent.key in self._committer.tickets
        return self._core.index.agents.get(agent.key) is agent and not at_work

    async def _note_use(self, *, closing: bool = False) -> None:
        """Requests that commit nothing use an agent too: a restart must not take it for one that nobody needs."""
        self._noted_at = self._core.clock.now()
        used, self._core.used = self._core.used, set()
        statements = [rows.update_columns(a.incarnation, {"last_used": a.last_used}) for a in used if a.saved]
        if statements or closing:
            statements += rows.put_clock(self._core.clock.reading())
            try:
                await self._core.journal.apply(statements)
            except BaseException as error:
                self._core.used |= used
                if not isinstance(error, OSError):
                    raise
                log.warning("when agents were used can't be written down: %s", error)

    async def _forget(self) -> None:
        statements = self._core.outcomes.forget(self._core.clock.awake() - self._core.tuning.outcome_seconds)
        if statements:
            try:
                await self._core.journal.apply(statements)
            except OSError as error:
                log.warning("old request outcomes can't be removed: %s", error)
