"""Runs a soak and says what it came to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from warmkv_bench.environment import environment
from warmkv_bench.options import ServerChoice
from warmkv_bench.prompts import Prompts
from warmkv_bench.soak.checks import Memory, Replays, at_rest, empty, idle, replay
from warmkv_bench.soak.traffic import Traffic
from warmkv_bench.target import Target

STUCK_S = 120.0
"""A request that takes longer is stuck."""

UNQUANTISED_TOLERANCE = 0.001
"""Natural logarithms. Another order of the same 32-bit sums changes no more."""
QUANTISED_TOLERANCE = 0.3
"""Natural logarithms. What another order of sums changes in the last bit can put a value on the other side of a
quantisation step, and what reads that value differs by a step, layer after layer."""

READINGS = 400
"""Of memory, over a run."""


@dataclass(frozen=True, slots=True)
class Soak:
    """What to do.

    Attributes:
        requests, seconds: the traffic ends with whichever comes first.
        concurrency: requests at once.
        replays: answers that are computed again at the end.
        tolerance: how far the runner-up may be behind, in natural logarithms, where an answer parts from its replay;
            None for what suits the server's KV.
        memory: how much the resident set may grow after the warm-up, as a part of it.
    """

    requests: int = 5000
    agents: int = 200
    seconds: float = 240.0
    concurrency: int = 16
    replays: int = 150
    tolerance: float | None = None
    memory: float = 0.05
    seed: int = 0


@dataclass(slots=True)
class Findings:
    """What a soak came to. No breaches: nothing was wrong."""

    soak: Soak
    environment: dict[str, Any]
    seconds: float
    counts: dict[str, int]
    outcomes: dict[str, int]
    sources: dict[str, int]
    memory: list[tuple[float, int]]
    growth: float | None
    replays: Replays
    gauges: dict[str, Any]
    breaches: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": 1, **asdict(self)}


async def run_soak(soak: Soak, server: ServerChoice) -> Findings:
    """Traffic, then rest, then the answers again.

    Raises:
        ServerFailed: the server does not start, or dies.
    """
    async with server.connected(STUCK_S) as target:
        return await _run(soak, server, target)


async def _run(soak: Soak, server: ServerChoice, target: Target) -> Findings:
    client = target.client
    info = await client.info()
    where = environment(info, target.data_dir, server.arguments)
    tolerance = soak.tolerance
    if tolerance is None:
        tolerance = QUANTISED_TOLERANCE if info.kv_bits else UNQUANTISED_TOLERANCE
        soak = replace(soak, tolerance=tolerance)
    await client.delete_leftovers()
    traffic = Traffic(client, await Prompts.of_server(client, soak.seed), soak.agents, soak.seed, soak.replays)
    memory = Memory(target.pid)
    began = time.perf_counter()
    async with _alongside(memory, soak.seconds / READINGS):
        workers = [_work(traffic, soak, began + soak.seconds) for _ in range(soak.concurrency)]
        await asyncio.gather(*workers)
    seconds = time.perf_counter() - began
    target.raise_if_dead()
    breaches = list(traffic.breaches)
    gauges = await at_rest(client, idle)
    if not idle(gauges):
        breaches.append(f"nothing is asked of the server, and it is not at rest: {gauges}")
    await client.delete_leftovers()
    gauges = await at_rest(client, empty)
    if not empty(gauges):
        breaches.append(f"every agent is deleted, and something is left: {gauges}")
    replays = await replay(client, traffic.samples, tolerance)
    breaches += replays.wrong
    growth = memory.growth()
    if growth is not None and growth > soak.memory:
        breaches.append(f"the resident set grew by {growth:.1%} after the warm-up, and may by {soak.memory:.0%}")
    target.raise_if_dead()
    return Findings(
        soak,
        where,
        seconds,
        dict(traffic.counts),
        dict(traffic.outcomes),
        dict(traffic.sources),
        memory.series,
        growth,
        replays,
        {"hot_bytes": gauges.hot_bytes, "queue_depth": gauges.queue_depth, "batch_size": gauges.batch_size},
        breaches,
    )


async def _work(traffic: Traffic, soak: Soak, until: float) -> None:
    while traffic.requests < soak.requests and time.perf_counter() < until:
        await traffic.one()


@asynccontextmanager
async def _alongside(memory: Memory, interval_s: float) -> AsyncIterator[None]:
    watching = asyncio.create_task(memory.watch(interval_s))
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
