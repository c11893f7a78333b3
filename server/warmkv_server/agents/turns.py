"""The queue of each agent: its requests run one after another, in order of arrival.

Agents are independent of each other. A delete goes before everything that waits, and ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from warmkv_server.agents.run import Run
from warmkv_server.agents.types import IDLE, Doing
from warmkv_server.contract.fairness import Bound
from warmkv_server.contract.names import AgentKey
from warmkv_server.errors import QueueFull, WarmKVError


@dataclass(eq=False)
class Place:
    """A run's place in its agent's line.

    Attributes:
        makes: whether the run makes the agent where there is none.
    """

    run: Run[Any]
    overtakes: bool = False
    makes: bool = False
    first: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Overtaking:
    """A run that goes before others.

    Attributes:
        overtaken: the runs that were there and hadn't been told to stop.
    """

    overtaken: list[Run[Any]]
    place: Place

    async def stop(self, reason: WarmKVError) -> int:
        """Stop what was overtaken, and wait until the turn is free. Returns how many were stopped."""
        stopped = [run for run in self.overtaken if run.stopped is None and not run.over.is_set()]
        for run in stopped:
            run.stop(reason)
        await self.place.first.wait()
        return len(stopped)


class Turns:
    """A line of runs for each agent that has any; the first in the line has the turn.

    Args:
        bound: on the runs that wait, over all agents.
    """

    def __init__(self, bound: Bound) -> None:
        self._bound = bound
        self._lines: dict[AgentKey, list[Place]] = {}

    @asynccontextmanager
    async def take(self, key: AgentKey, run: Run[Any], *, makes: bool = False) -> AsyncIterator[None]:
        """Wait for the turn and hold it for the block. Without an agent_id there is no line to wait in.

        Args:
            makes: whether it makes the agent where there is none, and is to be seen while it does.

        Raises:
            QueueFull: if too many wait already.
        """
        if not key.agent_id:
            yield
            return
        line = self._lines.get(key, [])
        if line and self._bound.refuses(self.waiting, self._waiting_of(key.tenant)):
            raise QueueFull(
                f"{self.waiting} requests wait for the turn of their agent, the most this server allows; try again",
                retry_after=1.0,
                limit=self._bound.most,
                actual=self.waiting,
                unit="requests",
            )
        async with self._stand(key, Place(run, makes=makes), len(line)):
            yield

    @asynccontextmanager
    async def overtake(self, key: AgentKey, run: Run[Any]) -> AsyncIterator[Overtaking]:
        """Go before everything that waits, beside what has the turn. What arrives from now on comes after the block.

        Others that overtook keep their place.
        """
        line = self._lines.get(key, [])
        overtaken = [place.run for place in line if not place.overtakes and place.run.stopped is None]
        waiting_first = sum(place.overtakes for place in line[1:])
        place = Place(run, overtakes=True)
        async with self._stand(key, place, min(1, len(line)) + waiting_first, wait=False):
            yield Overtaking(overtaken, place)

    def doing(self, key: AgentKey) -> Doing:
        """What is being done for an agent."""
        line = self._lines.get(key)
        return line[0].run.doing if line else IDLE

    def is_made(self, key: AgentKey) -> bool:
        """Whether a run is to make the agent where there is none, as far as it wasn't told to stop."""
        return any(place.makes and place.run.stopped is None for place in self._lines.get(key, ()))

    def made_of(self, tenant: str) -> list[str]:
        """The agent_ids of a tenant for which that is so."""
        return [key.agent_id for key in self._lines if key.tenant == tenant and self.is_made(key)]

    @property
    def lines(self) -> int:
        """Agents for which there is a run, or more."""
        return len(self._lines)

    @property
    def waiting(self) -> int:
        """Runs that wait for their turn, over all agents."""
        return sum(len(line) - 1 for line in self._lines.values())

    def _waiting_of(self, tenant: str) -> int:
        return sum(len(line) - 1 for key, line in self._lines.items() if key.tenant == tenant)

    @asynccontextmanager
    async def _stand(self, key: AgentKey, place: Place, position: int, *, wait: bool = True) -> AsyncIterator[None]:
        line = self._lines.setdefault(key, [])
        line.insert(position, place)
        if line[0] is place:
            place.first.set()
        try:
            if wait:
                await place.first.wait()
            yield
        finally:
            had_turn = line[0] is place
            line.remove(place)
            if not line:
                del self._lines[key]
            elif had_turn:
                line[0].first.set()
