"""More agents than RAM holds, one after another: does the reload hide behind other agents' decoding?

Laps of two kinds alternate, with the same number of requests and the same number at once. RESIDENT laps go around
agents that are in RAM together; ROTATING laps go around all of them, so that every request has to load, if the least
recently used goes first. What the loads added to the laps, against the time that they took, is the part that was not
hidden.

The requests are ephemeral: the contexts stay as long as they are, and all laps are alike.
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

HEATING, RESIDENT, ROTATING = "heating", "resident", "rotating"
# Loads that take less than this part of the run drown in its noise.
TELLING_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """`agents` contexts of `context_tokens`, of which `resident` fit into RAM; each kind of lap `laps` times."""

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

    async def hot_bytes(self, client: Client, prompts: Prompts) -> int:
        """A limit of the hot tier that holds `resident` agents and not one more, by what one takes on this server."""
        name = f"{AGENT_PREFIX}round-robin.sizing"
        before = (await client.stats()).gauges.hot_bytes
        await client.prime(name, tokens_content(prompts.tokens(0, self.context_tokens)))
        one = (await client.stats()).gauges.hot_bytes - before
        await client.delete(name)
        return int((self.resident + 0.5) * one)

    async def run(self, driver: Driver, prompts: Prompts) -> Figures:
        """Primes the agents and goes around them; returns the figures."""
        names = [f"{AGENT_PREFIX}round-robin.{index}" for index in range(self.agents)]
        for index, name in enumerate(names):
            await driver.client.prime(name, tokens_content(prompts.tokens(index, self.context_tokens)))
        resident = names[: self.resident]
        # From the first agent that is not in RAM, so that the first request has to load, too.
        turned = names[self.resident :] + resident
        seconds = {RESIDENT: 0.0, ROTATING: 0.0}
        await driver.start()
        for _ in range(self.laps):
            for name in resident:
                await driver.ask(self._request(name, prompts, 1), HEATING)
            seconds[RESIDENT] += await self._lap(driver, prompts, resident, RESIDENT)
            seconds[ROTATING] += await self._lap(driver, prompts, turned, ROTATING)
        return self._figures(driver.turns, seconds[RESIDENT], seconds[ROTATING])

    async def _lap(self, driver: Driver, prompts: Prompts, names: list[str], phase: str) -> float:
        """As many requests as there are agents, to `names` in turn; returns the seconds that they took."""
        waiting = iter(range(self.agents))

        async def worker() -> None:
            for index in waiting:
                await driver.ask(self._request(names[index % len(names)], prompts, self.output_tokens), phase)

        begin = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(self.concurrency)))
        return time.perf_counter() - begin

    def _request(self, name: str, prompts: Prompts, output_tokens: int) -> pb.GenerateRequest:
        content = tokens_content(prompts.tokens(0, self.suffix_tokens))
        return generation(name, content, output_tokens, ephemeral=True)

    def _figures(self, turns: list[Turn], resident_s: float, rotating_s: float) -> Figures:
        loads_s = sum(turn.load_ms for turn in turns if turn.phase == ROTATING) / 1e3
        added_s = rotating_s - resident_s
        telling = loads_s > TELLING_SHARE * resident_s
        return {
            "resident_s": resident_s,
            "rotating_s": rotating_s,
            "resident_hot_share": _share(turns, RESIDENT, "HOT"),
            "rotating_warm_share": _share(turns, ROTATING, "WARM"),
            "loads_s": loads_s,
            "added_s": added_s,
            "loads_share_of_resident_time": loads_s / resident_s,
            "hidden_share_of_loads": 1 - added_s / loads_s if telling else "too little was loaded to tell",
        }


def _share(turns: list[Turn], phase: str, source: str) -> float | None:
    found = [turn.source == source for turn in turns if turn.phase == phase]
    return sum(found) / len(found) if found else None
