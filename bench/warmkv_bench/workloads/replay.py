"""Replays a trace at its own pace, and compares the hit ratio with that of a cache that forgets nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from warmkv import v1 as pb
from warmkv_bench.client import AGENT_PREFIX, generation, tokens_content
from warmkv_bench.prompts import Prompts
from warmkv_bench.workloads.trace import Sessions, TraceRequest, ideal_cached_tokens
from warmkv_bench.workloads.turns import Driver, Figures


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace on a model whose contexts hold `context_limit` tokens; what doesn't fit is left out, and counted."""

    requests: list[TraceRequest]
    context_limit: int

    async def run(self, driver: Driver, prompts: Prompts) -> Figures:
        """Sends every request when it is due, open loop; returns the figures."""
        fitting = [one for one in self.requests if one.input_tokens + one.output_tokens <= self.context_limit]
        sessions = Sessions()
        agents = [f"{AGENT_PREFIX}trace.{sessions.assign(request.hash_ids)}" for request in fitting]
        # Built before the clock starts: long prompts take the client longer than the gaps of a dense trace.
        built = [_generation(agent, request, prompts) for agent, request in zip(agents, fitting, strict=True)]
        await driver.start()
        async with asyncio.TaskGroup() as running:
            for request, generate in zip(fitting, built, strict=True):
                await driver.at(request.due_ms)
                running.create_task(driver.ask(generate, "replay", request.due_ms))
        total = sum(request.input_tokens for request in fitting)
        cached = sum(turn.cached_tokens for turn in driver.turns)
        ideal = sum(ideal_cached_tokens(fitting))
        return {
            "requests": len(fitting),
            "left_out": len(self.requests) - len(fitting),
            "sessions": len(set(agents)),
            "input_tokens": total,
            "hit_ratio": cached / total if total else None,
            "ideal_hit_ratio": ideal / total if total else None,
            "share_of_ideal": cached / ideal if ideal else None,
            "client_late_ms": max((turn.sent_ms - turn.scheduled_ms for turn in driver.turns), default=0.0),
        }


def prompt_of(request: TraceRequest, prompts: Prompts) -> list[int]:
    """The input as token ids: equal hash ids give equal blocks."""
    blocks = [prompts.tokens(hash_id, request.block_tokens) for hash_id in request.hash_ids]
    return [token for block in blocks for token in block][: request.input_tokens]


def _generation(name: str, request: TraceRequest, prompts: Prompts) -> pb.GenerateRequest:
    """The input is the whole context of the session's agent; the server finds what of it is held."""
    built = generation(name, tokens_content(prompt_of(request, prompts)), request.output_tokens)
    built.context_mode = pb.CONTEXT_MODE_REPLACE
    return built
