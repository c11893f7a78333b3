"""The way of events from the MLX thread to the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
Item = TypeVar("Item")


class Delivery(Generic[Item]):
    """Passes items to an event loop, in order, at once or when the sender is about to wait.

    Waking an event loop is a system call, which lets go of Python's lock: the loop takes it, and the sender is held up
    until the loop has served everybody. Where the sender soon waits without the lock anyway, a thread of this class
    wakes the loop then: it can't run sooner, because handing it an item lets go of nothing.

    An item that `receive` breaks on is lost, and the ones behind it arrive.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, receive: Callable[[Item], None]) -> None:
        self._loop = loop
        self._receive = receive
        self._items: deque[Item] = deque()
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wake_when_called, name="delivery", daemon=True)
        self._thread.start()

    def send(self, item: Item, *, at_once: bool) -> None:
        """From one thread. `at_once` lets the loop run now, at the cost of the sender."""
        self._items.append(item)
        if at_once:
            self._wake()
        else:
            self._calls.put(True)

    def close(self) -> None:
        """Have everything that was sent on its way. Blocks for a moment."""
        self._calls.put(False)
        self._thread.join()

    def _wake_when_called(self) -> None:
        while self._calls.get():
            try:
                self._wake()
            except RuntimeError:  # the loop is closed: nobody is there to be woken
                if not self._loop.is_closed():
                    log.exception("the event loop can't be woken; it is tried again with the next event")

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._receive_all)

    def _receive_all(self) -> None:
        while self._items:
            try:
                self._receive(self._items.popleft())
            except Exception:
                log.exception("events of the engine are lost")
