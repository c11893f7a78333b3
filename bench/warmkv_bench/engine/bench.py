"""What every comparison works with: the server, the prompts, mlx-lm beside it, and the time that is left."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from warmkv import v1 as pb
from warmkv_bench.client import AGENT_PREFIX, Answer, Client, generation, tokens_content
from warmkv_bench.engine.mlx_lm_process import MLXLM
from warmkv_bench.engine.outcome import Comparison, Target
from warmkv_bench.prompts import Prompts

SUFFIX = 32
"""New tokens of a request whose comparison names no other number."""

SHORT = 1024
"""Tokens of the contexts that stand beside others."""

MOST_AGENTS = 16
"""Contexts of one length, at most."""

Measure = Callable[[], Awaitable[float]]


class WrongPath(Exception):
    """The server served a request otherwise than the comparison needs it, so that its time means nothing."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. Contexts are prefixes in tokens."""

    runs: int = 10
    contexts: tuple[int, ...] = (1024, 32_256)
    suffixes: tuple[int, ...] = (32, 256)
    cold_tokens: int = 4096
    decode_tokens: int = 96
    streams: int = 8
    max_decode_gap_ms: int = 200
    stock_runs: int = 10


QUICK = Plan(runs=3, contexts=(1024,), suffixes=(32,), cold_tokens=1024, decode_tokens=48, stock_runs=1)


@dataclass(slots=True)
class Streamed:
    """One answer on the benchmark's clock: `begun` is when the call was made, in milliseconds."""

    begun: float
    answer: Answer

    @property
    def times(self) -> list[float]:
        return [self.begun + moment for moment in self.answer.token_times_ms]


@dataclass
class Bench:
    """One model, served and in mlx-lm's hands."""

    model: str
    plan: Plan
    client: Client
    mlx_lm: MLXLM
    prompts: Prompts
    say: Callable[[str], None]
    deadline: float
    """In seconds of `time.monotonic`; no repetition begins after it."""
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    gaps: list[dict[str, Any]] = field(default_factory=list)
    _fresh: int = 10_000

    async def compare(
        self,
        name: str,
        case: str,
        unit: str,
        ours: Measure,
        theirs: Mapping[str, tuple[Measure, Target | None]],
        *,
        runs: int | None = None,
    ) -> None:
        """Measures everybody once in each repetition, in a random order, after one repetition that isn't counted."""
        everybody = {"warmkv": ours, **{who: measure for who, (measure, _) in theirs.items()}}
        found: dict[str, list[float]] = {who: [] for who in everybody}
        for repetition in range((runs or self.plan.runs) + 1):
            if time.monotonic() > self.deadline:
                self.problems.append(f"{self.model} {name}, {case}: time was up after {repetition} repetitions")
                break
            order = list(everybody)
            random.Random(f"{name}/{case}/{repetition}").shuffle(order)
            taken = {who: await everybody[who]() for who in order}
            if repetition:
                for who, value in taken.items():
                    found[who].append(value)
        if not found["warmkv"]:
            return
        self.samples.append({"comparison": name, "model": self.model, "case": case, "unit": unit, "values": found})
        for who, (_, target) in theirs.items():
            compared = Comparison(name, self.model, case, unit, who, found["warmkv"], found[who], target)
            self.add(compared.outcome())

    def add(self, outcome: dict[str, Any]) -> None:
        self.outcomes.append(outcome)
        self.say(
            f"{outcome['model']} {outcome['comparison']}, {outcome['case']}, against {outcome['against']}: "
            f"{outcome['ours']:.1f} to {outcome['theirs']:.1f} {outcome['unit']}, ratio {outcome['ratio']:.2f} "
            f"{outcome['verdict']}"
        )

    def fresh(self, tokens: int) -> list[int]:
        """Tokens that the server has not seen, from the first one on."""
        while True:
            self._fresh += 1
            found = self.prompts.tokens(self._fresh, tokens)
            if found[0] not in self._first_tokens:
                return found

    def suffix(self, tokens: int = SUFFIX) -> list[int]:
        return self.fresh(tokens)

    async def primed(self, context: int, number: int = 0) -> str:
        """An agent whose context has so many tokens, in RAM; the `number`-th of its length."""
        agent_id = f"{AGENT_PREFIX}engine.{context}.{number}"
        await self.client.prime(agent_id, tokens_content(self.prompts.tokens(_ordinal(context, number), context)))
        # After a restart of the server on kept data this is what brings it into RAM.
        await self.client.generate(generation(agent_id, tokens_content(self.suffix()), 1, ephemeral=True))
        return agent_id

    async def ask(
        self,
        agent_id: str,
        suffix: Sequence[int],
        tokens: int,
        source: pb.CacheSource.ValueType,
        answer: Answer | None = None,
    ) -> Streamed:
        """One answer that changes nothing.

        Raises:
            WrongPath: the context did not come from where it should.
        """
        request = generation(agent_id, tokens_content(suffix), tokens, ephemeral=True)
        begun = time.perf_counter() * 1e3
        got = Streamed(begun, await self.client.generate(request, answer))
        report = got.answer.finished.cache
        if report.source != source or report.prefilled_tokens != len(suffix):
            raise WrongPath(
                f"{agent_id or 'a new context'} was served from {pb.CacheSource.Name(report.source)} with "
                f"{report.prefilled_tokens} tokens prefilled, not {pb.CacheSource.Name(source)} with {len(suffix)}"
            )
        return got

    async def together(
        self, agents: Sequence[str], tokens: int, source: pb.CacheSource.ValueType = pb.CACHE_SOURCE_HOT
    ) -> list[Streamed]:
        """One answer of each agent, all asked at once."""
        return await asyncio.gather(*(self.ask(agent, self.suffix(), tokens, source) for agent in agents))

    async def ttft_cold(self, tokens: int) -> float:
        got = await self.ask("", self.fresh(tokens), 1, pb.CACHE_SOURCE_COLD)
        return first_token_ms(got)

    @cached_property
    def _first_tokens(self) -> set[int]:
        """Of every context that may be kept, in this run or from the last: a cold one must begin otherwise."""
        kept = ((context, number) for context in (SHORT, *self.plan.contexts) for number in range(MOST_AGENTS))
        return {self.prompts.tokens(_ordinal(*each), 1)[0] for each in kept}

    def on(self, client: Client) -> Bench:
        """The same with another server."""
        return replace(self, client=client)


def _ordinal(context: int, number: int) -> int:
    """Which of the prompts an agent's context is."""
    return MOST_AGENTS * (context % 97) + number


def first_token_ms(got: Streamed) -> float:
    if got.answer.first_delta_ms is None:
        raise WrongPath("an answer had no token")
    return got.answer.first_delta_ms
