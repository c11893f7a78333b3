"""Whether calls come in: not while the model loads, and not while the server drains."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from warmkv_server.agents.agents import Agents
from warmkv_server.errors import Draining, Loading


class Gate:
    """Stands before everything but health and reflection. Closed until `open`, and again from `close` on.

    Attributes:
        agents: all there are, once it was open.
        text_bytes: of content that a context can hold at most; None if that isn't known, or not yet.
        closing: set once it is closed for good, for calls that have no end of their own.
    """

    def __init__(self) -> None:
        self.text_bytes: int | None = None
        self.agents: Agents | None = None
        self.closing = asyncio.Event()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def open(self, agents: Agents, text_bytes: int | None = None) -> None:
        self.agents, self.text_bytes = agents, text_bytes

    def close(self) -> None:
        """Let nobody in any more. Who is inside stays."""
        self.closing.set()

    def check(self) -> Agents:
        """Who would be inside, now.

        Raises:
            Loading, Draining
        """
        if self.closing.is_set():
            raise Draining("the server is shutting down; try another, or this one again later", retry_after=5.0)
        if self.agents is None:
            raise Loading("the server is loading its model; try again", retry_after=1.0)
        return self.agents

    @contextmanager
    def enter(self) -> Iterator[Agents]:
        """Be inside for the block.

        Raises:
            Loading, Draining
        """
        agents = self.check()
        self._inside += 1
        self._empty.clear()
        try:
            yield agents
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def empty(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()
