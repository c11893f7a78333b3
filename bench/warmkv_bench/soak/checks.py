"""What is checked of a server that has been through a soak: its answers, its memory, and that it has come to rest."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from warmkv import v1 as pb
from warmkv_bench.client import Client, generation, tokens_content
from warmkv_bench.memory import resident_bytes
from warmkv_bench.soak.calls import ask
from warmkv_bench.soak.traffic import Sample

REST_S = 60.0
"""A server that has nothing to do has come to rest within so many seconds."""

WARM_UP, WINDOW = 0.4, 0.15
"""Parts of a run: its warm-up, and the windows at its start and end whose memory is compared."""


@dataclass(frozen=True, slots=True)
class Replays:
    """Answers that were asked for again, computed from nothing, with nothing else running.

    Attributes:
        equal: of them, those with the same tokens.
        margins: of the others, how sure the server was where they part, in natural logarithms.
        wrong: in words, those that part where it was sure.
    """

    count: int
    tokens: int
    equal: int
    margins: list[float]
    wrong: list[str]


async def replay(client: Client, samples: Sequence[Sample], tolerance: float) -> Replays:
    """Asks for answers again, one by one. No agent may be left that their prompts could be reused from."""
    margins: list[float] = []
    wrong: list[str] = []
    tokens = 0
    for sample in samples:
        request = generation("", tokens_content(sample.prompt), len(sample.answer))
        request.top_logprobs = 2
        reply = await ask(client, request)
        if reply.finished is None or reply.finished.cache.source != pb.CACHE_SOURCE_COLD:
            wrong.append(f"a replay did not compute its answer from nothing: {reply.error} {reply.finished}")
            continue
        parted = next(
            (n for n, pair in enumerate(zip(reply.tokens, sample.answer, strict=False)) if len(set(pair)) > 1), None
        )
        tokens += len(sample.answer) if parted is None else parted
        if parted is not None:
            margins.append(reply.margins[parted])
            if reply.margins[parted] > tolerance:
                wrong.append(
                    f"token {parted} of an answer to {len(sample.prompt)} tokens ({sample.source}) was "
                    f"{sample.answer[parted]} and alone is {reply.tokens[parted]}, by {reply.margins[parted]:.4f}"
                )
    return Replays(len(samples), tokens, len(samples) - len(margins), margins, wrong)


class Memory:
    """The server's resident set over time: (seconds, bytes)."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self.series: list[tuple[float, int]] = []

    async def watch(self, interval_s: float) -> None:
        """Reads it over and over, until cancelled."""
        began = time.perf_counter()
        while self._pid is not None:
            found = await asyncio.to_thread(resident_bytes, self._pid)
            if found is not None:
                self.series.append((time.perf_counter() - began, found))
            await asyncio.sleep(interval_s)

    def growth(self) -> float | None:
        """How much larger the last window's median is than that of the first after the warm-up; None if unknown."""
        if len(self.series) < 20:
            return None
        end = self.series[-1][0]

        def median(start: float) -> float:
            return statistics.median(size for at, size in self.series if start * end <= at <= (start + WINDOW) * end)

        return median(1 - WINDOW) / median(WARM_UP) - 1


async def at_rest(client: Client, what: Callable[[pb.ServerGauges], bool]) -> pb.ServerGauges:
    """The gauges once they are as they must be, or as they are after the patience of `REST_S`."""
    deadline = time.perf_counter() + REST_S
    while True:
        gauges = (await client.stats()).gauges
        if what(gauges) or time.perf_counter() > deadline:
            return gauges
        await asyncio.sleep(0.1)


def idle(gauges: pb.ServerGauges) -> bool:
    return not (gauges.queue_depth or gauges.batch_size)


def empty(gauges: pb.ServerGauges) -> bool:
    return idle(gauges) and not gauges.hot_bytes and not sum(gauges.agents_by_tier.values())
