"""Conversations of many turns with time to think between them, closed or open loop.

Closed: each agent waits for the answer, thinks, and goes on; a slow server is asked less. Open: turns come as a Poisson
process whatever the server does, each to the next agent in turn; a slow server builds a queue, and latency counts from
when a turn was due.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from enum import StrEnum

from warmkv_bench.client import AGENT_PREFIX, generation, tokens_content
from warmkv_bench.config import ConfigError
from warmkv_bench.prompts import Prompts
from warmkv_bench.workloads.turns import Driver, Figures


class Loop(StrEnum):
    """What decides when the next turn comes: the answer before it, or the clock."""

    CLOSED = "closed"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Conversation:
    """`agents` conversations of `turns` turns.

    Attributes:
        first_tokens: length of the opening message; `turn_tokens`: of each later one.
        think_s: mean of the exponential time to think (closed loop).
        rate_per_s: turns of all agents for each second (open loop).
    """

    agents: int
    turns: int
    first_tokens: int
    turn_tokens: int
    output_tokens: int
    loop: Loop
    think_s: float
    rate_per_s: float
    seed: int

    def __post_init__(self) -> None:
        if self.loop == Loop.OPEN and self.rate_per_s <= 0:
            raise ConfigError(f"--rate is {self.rate_per_s:g}: it must be above 0 turns a second")
        if self.think_s < 0:
            raise ConfigError(f"--think is {self.think_s:g}: it must be at least 0 seconds")

    async def run(self, driver: Driver, prompts: Prompts) -> Figures:
        """Runs all turns; returns the figures."""
        await driver.start()
        if self.loop == Loop.CLOSED:
            await asyncio.gather(*(self._converse(driver, prompts, agent) for agent in range(self.agents)))
        else:
            await self._arrive(driver, prompts)
        late = max((turn.sent_ms - turn.scheduled_ms for turn in driver.turns), default=0.0)
        return {"client_late_ms": late, "offered_turns_per_s": self.rate_per_s if self.loop == Loop.OPEN else None}

    async def _converse(self, driver: Driver, prompts: Prompts, agent: int) -> None:
        rng = random.Random(f"{self.seed}/{agent}")
        for turn in range(self.turns):
            if turn:
                await asyncio.sleep(rng.expovariate(1 / self.think_s) if self.think_s else 0.0)
            await self._turn(driver, prompts, agent, turn, None)

    async def _arrive(self, driver: Driver, prompts: Prompts) -> None:
        """Turns of one agent keep their order: the server runs them as they arrive."""
        async with asyncio.TaskGroup() as running:
            for index, due_ms in enumerate(arrivals_ms(self.agents * self.turns, self.rate_per_s, self.seed)):
                await driver.at(due_ms)
                turn, agent = divmod(index, self.agents)
                running.create_task(self._turn(driver, prompts, agent, turn, due_ms))

    async def _turn(self, driver: Driver, prompts: Prompts, agent: int, turn: int, due_ms: float | None) -> None:
        length = self.turn_tokens if turn else self.first_tokens
        content = tokens_content(prompts.tokens(turn * self.agents + agent, length))
        name = f"{AGENT_PREFIX}conversation.{agent}"
        await driver.ask(generation(name, content, self.output_tokens), "later" if turn else "first", due_ms)


def arrivals_ms(count: int, rate_per_s: float, seed: int) -> list[float]:
    """When each of `count` turns is due, in milliseconds: a Poisson process of the given rate."""
    rng = random.Random(f"{seed}/arrivals")
    due_ms, times = 0.0, []
    for _ in range(count):
        due_ms += rng.expovariate(rate_per_s) * 1e3
        times.append(due_ms)
    return times
