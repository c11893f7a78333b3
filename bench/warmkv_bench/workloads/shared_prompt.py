"""Many agents with one system prompt: what the second one and all others save, in time and on disk."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from warmkv_bench.client import AGENT_PREFIX, generation, tokens_content
from warmkv_bench.prompts import Prompts
from warmkv_bench.stats import estimate
from warmkv_bench.workloads.turns import Driver, Figures, Turn

FIRST, OTHERS = "first", "others"


@dataclass(frozen=True, slots=True)
class SharedPrompt:
    """`agents` agents that start with the same `prompt_tokens` and go on with `question_tokens` of their own."""

    agents: int
    prompt_tokens: int
    question_tokens: int
    output_tokens: int
    concurrency: int

    async def run(self, driver: Driver, prompts: Prompts) -> Figures:
        """The first agent computes the prompt, the others follow `concurrency` at a time; returns the figures."""
        system = prompts.tokens(0, self.prompt_tokens)
        disk_before = (await driver.client.stats()).gauges.disk_bytes
        names = [f"{AGENT_PREFIX}shared-prompt.{index}" for index in range(self.agents)]
        waiting = iter(range(1, self.agents))

        async def start(index: int, phase: str) -> None:
            question = prompts.tokens(index + 1, self.question_tokens)
            await driver.ask(generation(names[index], tokens_content(system + question), self.output_tokens), phase)

        async def worker() -> None:
            for index in waiting:
                await start(index, OTHERS)

        await driver.start()
        await start(0, FIRST)
        await asyncio.gather(*(worker() for _ in range(self.concurrency)))
        disk = (await driver.client.stats()).gauges.disk_bytes - disk_before
        alone = sum([(await driver.client.agent(name)).warm_bytes for name in names])
        first = next(turn for turn in driver.turns if turn.phase == FIRST)
        others = [turn for turn in driver.turns if turn.phase == OTHERS]
        return {
            "first_ttft_ms": first.ttft_ms,
            "others_ttft_ms": _median_ttft_ms(others),
            "shared_share_of_prompt": min((turn.shared_tokens for turn in others), default=0) / self.prompt_tokens,
            "disk_bytes": disk,
            "disk_bytes_without_sharing": alone,
            "disk_saving": alone / disk if disk > 0 else None,
        }


def _median_ttft_ms(turns: list[Turn]) -> float | None:
    found = estimate([turn.ttft_ms for turn in turns if turn.ttft_ms is not None])
    return None if found is None else found.median
