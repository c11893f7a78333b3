"""Being told to stop, and waiting no longer than that; being told to read files again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any


class StopSignals:
    """The first and the second SIGTERM or SIGINT, as futures. Made on the event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        waiting = self.second if self.first.done() else self.first
        if not waiting.done():
            waiting.set_result(None)


def on_hangup(reload: Callable[[], None]) -> None:
    """Have it called on the event loop at every SIGHUP, which no longer ends the process."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


async def first_of(work: Coroutine[Any, Any, None], cut: asyncio.Future[None], seconds: float) -> None:
    """Wait for the work to end, until `cut` is done, and no longer than so many seconds."""
    task = asyncio.create_task(work)
    both: list[asyncio.Future[Any]] = [task, cut]
    await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
