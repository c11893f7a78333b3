"""More agents than RAM holds, one after another: does the reload hide behind other agents' decoding?

Two phases with the same number of requests and the same number at once. RESIDENT goes around agents that fit into the
hot tier together; ROTATING goes around all of them, so that every request has to load, if the least recently used goes.
What the loads added to the run, against the time that they took, is how much of them was not hidden.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from warmkv import v1 as pb
from warmkv_bench.client import AGENT_PREFIX, Client, generation, tokens_content
from warmkv_bench.config import ConfigError
from warmkv_bench.prompts import Prompts
from warmkv_bench.workloads.turns import Driver, Figures, Turn

RESIDENT, ROTATING = "resident", "rotating"
# Above the agents that are to be resident, so that rounding and the growth of contexts don't push one of them out.
HEADROOM = 1.10


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """`agents` contexts of `context_tokens`, of which `resident` fit into RAM; `laps` requests to each."""

    agents: int
    resident: int
    context_tokens: int
    laps: int
    concurrency: int
    suffix_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        if not self.concurrency <= self.resident < self.agents:
            raise ConfigError(
                f"--resident is {self.resident}: it must be at least --concurrency ({self.concurrency}) and less than "
                f"--agents ({self.agents})"
            )

    def hot_bytes(self, bytes_per_token: int) -> int:
        """A limit of the hot tier that holds the resident agents at their full length, and no other one."""
        turns = self.laps * self.agents / self.resident + self.laps + 2
        growth = turns * (self.suffix_tokens + self.output_tokens)
        return int(self.resident * (self.context_tokens + growth) * bytes_per_token * HEADROOM)

    async def run(self, driver: Driver, prompts: Prompts) -> Figures:
        """Primes the agents and runs both phases; returns the figures."""
        names = [f"{AGENT_PREFIX}round-robin.{index}" for index in range(self.agents)]
        for index, name in enumerate(names):
            await driver.client.prime(name, tokens_content(prompts.tokens(index, self.context_tokens)))
        requests = self.agents * self.laps
        # The resident agents are loaded once before they are measured.
        for name in names[: self.resident]:
            await driver.client.generate(self._request(name, prompts, 0))
        await driver.start()
        resident_s = await self._phase(driver, prompts, names[: self.resident], requests, RESIDENT)
        # From the first agent that is not in RAM, so that the first lap has to load, too.
        turned = names[self.resident :] + names[: self.resident]
        rotating_s = await self._phase(driver, prompts, turned, requests, ROTATING)
        return self._figures(driver.turns, resident_s, rotating_s)

    async def _phase(self, driver: Driver, prompts: Prompts, names: list[str], requests: int, phase: str) -> float:
        """Goes around the agents until `requests` are done; returns the seconds that it took."""
        waiting = iter(range(requests))

        async def worker() -> None:
            for index in waiting:
                await driver.ask(self._request(names[index % len(names)], prompts, index), phase)

        begin = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(self.concurrency)))
        return time.perf_counter() - begin

    def _request(self, name: str, prompts: Prompts, index: int) -> pb.GenerateRequest:
        return generation(name, tokens_content(prompts.tokens(index, self.suffix_tokens)), self.output_tokens)

    def _figures(self, turns: list[Turn], resident_s: float, rotating_s: float) -> Figures:
        loads_s = sum(turn.load_ms for turn in turns if turn.phase == ROTATING) / 1e3
        added_s = rotating_s - resident_s
        return {
            "resident_s": resident_s,
            "rotating_s": rotating_s,
            "resident_hot_share": _share(turns, RESIDENT, "HOT"),
            "rotating_warm_share": _share(turns, ROTATING, "WARM"),
            "loads_s": loads_s,
            "added_s": added_s,
            "hidden_share_of_loads": 1 - added_s / loads_s if loads_s else None,
        }


async def server_hot_bytes(client: Client, workload: RoundRobin) -> int:
    """The hot tier that the workload needs on this server's model, in bytes."""
    return workload.hot_bytes((await client.info()).kv_bytes_per_token)


def _share(turns: list[Turn], phase: str, source: str) -> float | None:
    found = [turn.source == source for turn in turns if turn.phase == phase]
    return sum(found) / len(found) if found else None
