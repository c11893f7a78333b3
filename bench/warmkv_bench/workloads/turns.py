"""One request of a workload, and what a workload as a whole came to."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from warmkv import v1 as pb
from warmkv_bench.client import BrokenStream, Client, RequestFailed
from warmkv_bench.proof import counter_faults, source_name
from warmkv_bench.samples import milliseconds
from warmkv_bench.stats import estimate

Figures = dict[str, float | int | str | None]


@dataclass(slots=True)
class Turn:
    """One request. Times are milliseconds: `scheduled_ms` and `sent_ms` since the start, the others durations.

    Attributes:
        phase: the part of the workload that the request belongs to.
        latency_ms: first token, from when the request was due. A client that falls behind does not hide it.
        ttft_ms: first token, from when it was sent.
        gaps_ms: between tokens.
        error: why it failed; then there are no times and no counts.
    """

    agent_id: str
    phase: str
    scheduled_ms: float
    sent_ms: float
    ttft_ms: float | None = None
    latency_ms: float | None = None
    e2e_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)
    output_tokens: int = 0
    source: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    shared_tokens: int = 0
    bytes_loaded: int = 0
    queue_ms: float = 0.0
    load_ms: float = 0.0
    error: str | None = None


class Driver:
    """Sends requests and keeps what came of them, also the cache reports, for the server's counters to confirm."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.turns: list[Turn] = []
        self.seconds = 0.0
        self._reports: list[pb.CacheReport] = []
        self._before = pb.ServerCounters()
        self._begin = 0.0

    async def start(self) -> None:
        """Starts the clock: what was sent before is set-up, and not measured."""
        self._before = (await self.client.stats()).counters
        self._begin = time.perf_counter()

    async def finish(self) -> list[str]:
        """Stops the clock; returns what is wrong with the requests, or with what the server counted meanwhile."""
        self.seconds = time.perf_counter() - self._begin
        failed = [turn.error for turn in self.turns if turn.error is not None]
        if failed:
            return [f"{len(failed)} of {len(self.turns)} requests failed, the first: {failed[0]}"]
        after = (await self.client.stats()).counters
        return counter_faults(self._before, after, self._reports)

    def now_ms(self) -> float:
        """Milliseconds since the start."""
        return (time.perf_counter() - self._begin) * 1e3

    async def at(self, scheduled_ms: float) -> None:
        """Waits until a request is due."""
        await asyncio.sleep(max(0.0, (scheduled_ms - self.now_ms()) / 1e3))

    async def ask(self, request: pb.GenerateRequest, phase: str, scheduled_ms: float | None = None) -> Turn:
        """Sends a request and waits for its end. A failure is a turn with an error, not an exception."""
        sent_ms = self.now_ms()
        turn = Turn(request.agent_id, phase, sent_ms if scheduled_ms is None else scheduled_ms, sent_ms)
        self.turns.append(turn)
        try:
            answer = await self.client.generate(request)
        except (RequestFailed, BrokenStream) as failure:
            turn.error = str(failure)
            return turn
        finished = answer.finished
        report = finished.cache
        self._reports.append(report)
        turn.ttft_ms = answer.first_delta_ms
        turn.e2e_ms = answer.e2e_ms
        if answer.first_delta_ms is not None:
            turn.latency_ms = answer.first_delta_ms + sent_ms - turn.scheduled_ms
        turn.gaps_ms = [round(after - before, 3) for before, after in pairwise(answer.token_times_ms)]
        turn.output_tokens = len(answer.token_ids)
        turn.source = source_name(report.source)
        turn.prompt_tokens = report.prompt_tokens
        turn.cached_tokens = report.cached_tokens
        turn.shared_tokens = report.shared_tokens
        turn.bytes_loaded = report.bytes_loaded
        turn.queue_ms = milliseconds(finished.timings.queue)
        turn.load_ms = milliseconds(finished.timings.load)
        if report.cached_tokens + report.prefilled_tokens != report.prompt_tokens:
            turn.error = "cached and prefilled tokens don't add up to the prompt"
        elif turn.output_tokens != request.max_tokens:
            turn.error = f"{turn.output_tokens} tokens were streamed, must be {request.max_tokens}"
        return turn


@dataclass(slots=True)
class WorkloadResult:
    """What a workload came to. `figures` are the answers to its question, by name."""

    name: str
    parameters: dict[str, Any]
    environment: dict[str, Any]
    turns: list[Turn]
    seconds: float
    figures: Figures
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "workload": self.name,
            "environment": self.environment,
            "parameters": self.parameters,
            "seconds": self.seconds,
            "figures": self.figures,
            "problems": self.problems,
            "summary": summarise(self.turns, self.seconds),
            "turns": [asdict(turn) for turn in self.turns],
        }


def summarise(turns: Sequence[Turn], seconds: float) -> dict[str, Any]:
    """Latencies by source, throughput, and the part of all prompt tokens that came from the cache."""
    done = [turn for turn in turns if turn.error is None]
    prompt = sum(turn.prompt_tokens for turn in done)
    by_source: dict[str, Any] = {}
    for source in dict.fromkeys(turn.source for turn in done if turn.source is not None):
        latencies = [turn.latency_ms for turn in done if turn.source == source and turn.latency_ms is not None]
        by_source[source] = _json(latencies)
    return {
        "requests": len(turns),
        "failed": len(turns) - len(done),
        "by_source": dict(Counter(turn.source for turn in done)),
        "hit_ratio": sum(turn.cached_tokens for turn in done) / prompt if prompt else None,
        "latency_ms": _json([turn.latency_ms for turn in done if turn.latency_ms is not None]),
        "latency_ms_by_source": by_source,
        "itl_ms": _json([gap for turn in done for gap in turn.gaps_ms]),
        "tokens_per_s": sum(turn.output_tokens for turn in done) / seconds if seconds else None,
        "requests_per_s": len(done) / seconds if seconds else None,
    }


def _json(values: list[float]) -> dict[str, Any] | None:
    found = estimate(values)
    return None if found is None else asdict(found)
