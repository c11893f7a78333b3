"""The end of a server: what is at work ends, what the disk has refused is written, and no dead disk is waited for.

What is lost is said. The exit status is 0 if nothing is, NOT_DURABLE if the disk went on refusing, and DEAD_DISK if a
file operation did not return.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from warmkv_server.agents.agents import Agents
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import Draining
from warmkv_server.kv.store import Store
from warmkv_server.platform.signals import StopSignals, first_of
from warmkv_server.service.gate import Gate

log = logging.getLogger(__name__)

T = TypeVar("T")

DEAD_DISK = 1
NOT_DURABLE = 3

_LAST_WORDS_SECONDS = 2.0
"""For the last messages of streams whose client reads slowly, once everything is committed. No signal takes it away:
what was sampled for a client and kept should reach it."""
_RETRY_SECONDS = 0.5
_DEAD_SECONDS = 30.0
_LEAST_DEAD_SECONDS = 5.0
"""A file operation that takes longer never returns; how long an operator is ready to wait decides in between."""
_LOOK_SECONDS = 0.25
_NAMES = 20


class Shutdown:
    """`--drain-seconds` are from the end of the notice on, for requests to end by themselves and then for a disk that
    refuses."""

    def __init__(self, store: Store, signals: StopSignals, settings: Settings) -> None:
        self._store = store
        self._signals = signals
        self._notice = settings.drain_notice_seconds
        self._seconds = settings.drain_seconds
        self._patience = min(max(self._seconds, _LEAST_DEAD_SECONDS), _DEAD_SECONDS)

    async def notice(self) -> None:
        """Health says NOT_SERVING: let routers see it while calls are still let in. A second signal cuts it short, and
        nobody is given notice of a server that has lost its engine or its port."""
        if self._notice and self._signals.first.done():
            log.info("taking calls for %g more seconds, so that routers see that this server stops", self._notice)
            await asyncio.wait([self._signals.second], timeout=self._notice)

    async def drain(self, agents: Agents, gate: Gate) -> int:
        """The notice is over, and nobody is let in any more: end what is at work. Returns the exit status."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        await first_of(agents.idle(), self._signals.second, self._seconds)
        agents.stop_all(Draining("the server is shutting down", retry_after=5.0))
        await self._unless_dead(agents.idle())  # what was sampled is committed
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(gate.empty(), _LAST_WORDS_SECONDS)
        if await self._write_owed(deadline):
            return 0
        log.error(
            "stopped although the disk refuses the last commits of %s: they are lost; what the index had of these "
            "agents before is there at the next start",
            _named(self._store.owed()),
        )
        return NOT_DURABLE

    async def close(self) -> None:
        """Let go of the data directory."""
        await self._unless_dead(self._store.close(), reads=True)

    async def _write_owed(self, deadline: float) -> bool:
        """Whether the disk has every last commit."""
        loop = asyncio.get_running_loop()
        if await self._unless_dead(self._store.flush()):
            return True
        log.error(
            "the disk refuses the last commits of %s, and they would be lost: trying for %.0f more seconds to write "
            "them; free disk space or make it writable, or send a second signal to stop without them",
            _named(self._store.owed()),
            max(deadline - loop.time(), 0.0),
        )
        while not self._signals.second.done() and (left := deadline - loop.time()) > 0:
            await asyncio.wait([self._signals.second], timeout=min(_RETRY_SECONDS, left))
            if await self._unless_dead(self._store.flush()):
                log.info("the disk has taken them")
                return True
        return False

    async def _unless_dead(self, work: Coroutine[Any, Any, T], *, reads: bool = False) -> T:
        """Wait for it. If a file operation never returns, the process ends here."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.wait([task], timeout=_LOOK_SECONDS)
            if not task.done() and (stalled := self._store.stalled_seconds(reads=reads)) > self._patience:
                self._give_up(stalled)
        return await task

    def _give_up(self, stalled: float) -> NoReturn:
        owed = self._store.owed()
        lost = f"the last commits of {_named(owed)} are not on it" if owed else "all that was committed is on it"
        log.error("the disk has not answered for %.0f seconds; stopped without it: %s", stalled, lost)
        logging.shutdown()
        os._exit(DEAD_DISK)  # Python would wait for the thread that waits for the disk.


def _named(owed: list[tuple[str, str]]) -> str:
    """
    Args:
        owed: tenant and agent_id of each.
    """
    names = [f"{agent!r}" + (f" of tenant {tenant!r}" if tenant else "") for tenant, agent in owed[:_NAMES]]
    more = [f"{len(owed) - _NAMES} more"] if len(owed) > _NAMES else []
    return f"{len(owed)} agent{'s' * (len(owed) != 1)} ({', '.join(names + more)})"
