"""The comparisons, one function each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from statistics import mean, median

from warmkv import v1 as pb
from warmkv_bench.client import AGENT_PREFIX, Answer, generation, tokens_content
from warmkv_bench.engine.bench import SHORT, SUFFIX, Bench, Measure, first_token_ms
from warmkv_bench.engine.outcome import Target, alternating_rate, fair_share, gaps_after, p99_outcome, total_rate

DECODERS = 4
MIXED_SHORT = 7
WARM_TOKENS = 4
LEAD_S = 2.0
"""Seconds for which the decoders run undisturbed, so that one step of theirs is known."""


class Name(StrEnum):
    """GAP comes before HOT: its cold prefill is the long context that HOT then reuses."""

    DECODE = "decode"
    STREAMS = "streams"
    WARM = "warm"
    PREFILL = "prefill"
    GAP = "gap"
    HOT = "hot"
    MIXED = "mixed"
    STOCK = "stock"


async def hot(bench: Bench) -> None:
    """Time to the first token after a context in RAM, over the socket, against generate_step in its own process."""
    for context in bench.plan.contexts:
        agent = await bench.primed(context)
        for count in bench.plan.suffixes:

            async def ours(agent: str = agent, count: int = count) -> float:
                return first_token_ms(await bench.ask(agent, bench.suffix(count), WARM_TOKENS, pb.CACHE_SOURCE_HOT))

            def theirs(form: str, context: int = context, count: int = count) -> Measure:
                return lambda: bench.mlx_lm.ttft(bench.suffix(count), prefix=context, form=form)

            forms = {
                "generate_step, same words": (theirs("dequantised"), Target(1.15, slack_ms=3.0)),
                "generate_step, QuantizedKVCache": (theirs("q4"), None),
                "generate_step, fp cache that is there": (theirs("fp"), None),
            }
            await bench.compare("hot", f"{context:,} + {count}", "ms", ours, forms)


async def decode(bench: Bench) -> None:
    """One stream's tokens a second."""
    agent = await bench.primed(SHORT)
    tokens = bench.plan.decode_tokens

    async def ours() -> float:
        return total_rate([(await bench.ask(agent, bench.suffix(), tokens, pb.CACHE_SOURCE_HOT)).times])

    def theirs(form: str) -> Measure:
        async def measure() -> float:
            return total_rate([await bench.mlx_lm.decode(bench.suffix(), prefix=SHORT, form=form, tokens=tokens)])

        return measure

    forms = {
        "generate_step, dequantised": (theirs("fp"), Target(0.95, at_least=True)),
        "generate_step, QuantizedKVCache": (theirs("q4"), None),
    }
    await bench.compare("decode", f"{SHORT:,} + {SUFFIX}", "tokens/s", ours, forms)


async def streams(bench: Bench) -> None:
    """Tokens a second of streams of one length together."""
    count, tokens = bench.plan.streams, bench.plan.decode_tokens
    agents = [await bench.primed(SHORT, number) for number in range(count)]

    async def ours() -> float:
        return total_rate([got.times for got in await bench.together(agents, tokens)])

    def theirs(form: str) -> Measure:
        async def measure() -> float:
            suffixes = [bench.suffix() for _ in range(count)]
            return total_rate(await bench.mlx_lm.batch(suffixes, prefix=SHORT, form=form, tokens=tokens))

        return measure

    forms = {
        "BatchGenerator, fp caches": (theirs("fp"), Target(0.95, at_least=True)),
        "BatchGenerator, 4-bit caches": (theirs("q4"), None),
    }
    await bench.compare("streams", f"{count} of {SHORT:,} + {SUFFIX}", "tokens/s", ours, forms)


async def mixed(bench: Bench) -> None:
    """Short contexts beside a long one, against running the two groups in turns, each at its own speed alone."""
    long_context = max(bench.plan.contexts)
    if long_context == SHORT:
        return
    tokens = bench.plan.decode_tokens
    short = [await bench.primed(SHORT, number) for number in range(MIXED_SHORT)]
    long = [await bench.primed(long_context)]

    async def rate(agents: list[str]) -> float:
        return total_rate([got.times for got in await bench.together(agents, tokens)])

    async def in_turns() -> float:
        return alternating_rate([(len(short), await rate(short)), (len(long), await rate(long))])

    what = f"{MIXED_SHORT} of {SHORT:,} beside {long_context:,}"
    against = {"the groups in turns": (in_turns, Target(0.8, at_least=True))}
    await bench.compare("mixed", what, "tokens/s", lambda: rate([*short, *long]), against)


async def warm(bench: Bench) -> None:
    """Warm hits that come at once, against what each costs alone, served one after another."""
    count = bench.plan.streams
    agents = [await bench.primed(SHORT, number) for number in range(count)]

    async def ours() -> float:
        for agent in agents:
            await bench.client.evict(agent)
        got = await bench.together(agents, WARM_TOKENS, pb.CACHE_SOURCE_WARM)
        return median(first_token_ms(one) for one in got)

    async def alone() -> float:
        await bench.client.evict(agents[0])
        return first_token_ms(await bench.ask(agents[0], bench.suffix(), WARM_TOKENS, pb.CACHE_SOURCE_WARM))

    async def share() -> float:
        return fair_share(await alone(), count)

    against = {"fair share of one's work": (share, Target(1.5))}
    await bench.compare("warm", f"{count} of {SHORT:,} + {SUFFIX}", "ms", ours, against)


async def prefill(bench: Bench) -> None:
    """A context that must be computed, our quantisation counted, against mlx-lm with an fp cache on the same BLAS."""
    tokens = bench.plan.cold_tokens

    def theirs(step: int) -> Measure:
        return lambda: bench.mlx_lm.ttft(bench.fresh(tokens), step=step)

    # As a ratio of speeds: at least 0.95 of theirs is at most 1 / 0.95 of their time.
    target = Target(1 / 0.95)
    forms = {f"generate_step, step {step}": (theirs(step), target) for step in (256, 512, 2048)}
    await bench.compare("prefill", f"{tokens:,} cold", "ms", lambda: bench.ttft_cold(tokens), forms)


async def gap(bench: Bench) -> None:
    """How long answers that stream are held up while a long context is prefilled beside them."""
    long_context = max(bench.plan.contexts)
    agents = [await bench.primed(SHORT, 1 + number) for number in range(DECODERS)]
    arriving = f"{AGENT_PREFIX}engine.{long_context}.0"
    await bench.client.delete(arriving)
    answers = [Answer() for _ in agents]
    begun = time.perf_counter() * 1e3
    room = 30_000
    requests = [generation(agent, tokens_content(bench.suffix()), room, ephemeral=True) for agent in agents]
    running = [
        asyncio.create_task(bench.client.generate(request, answer))
        for request, answer in zip(requests, answers, strict=True)
    ]
    await asyncio.sleep(LEAD_S)
    start = time.perf_counter() * 1e3 - begun
    await bench.primed(long_context)
    end = time.perf_counter() * 1e3 - begun
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    times = [answer.token_times_ms for answer in answers]
    before = [length for _, length in gaps_after(times, LEAD_S * 500, start)]
    step = mean(before)  # the tokens of several streams come in bursts: most gaps are none
    found = gaps_after(times, start, end)
    limit = bench.plan.max_decode_gap_ms + step
    what = f"{DECODERS} streams, {long_context:,} cold in {(end - start) / 1e3:.0f} s"
    bench.gaps.append(
        {
            "model": bench.model,
            "case": what,
            "start_ms": start,
            "end_ms": end,
            "step_ms": step,
            "limit_ms": limit,
            "gaps": [
                [(round(when, 1), round(length, 2)) for when, length in gaps_after([one], 0, end)] for one in times
            ],
        }
    )
    bench.add(p99_outcome(bench.model, what, [length for _, length in found], limit))


async def stock(bench: Bench, servers: dict[str, Bench]) -> None:
    """A cold context against mlx-lm as it comes: its own BLAS, its default step. At least so many times faster.

    Args:
        servers: the server on each fast BLAS, by the BLAS's name, each with mlx-lm on its own BLAS beside it.
    """
    tokens = bench.plan.cold_tokens
    for blas, other in servers.items():

        async def theirs(other: Bench = other) -> float:
            return await other.mlx_lm.ttft(other.fresh(tokens))

        async def ours(other: Bench = other) -> float:
            return await other.ttft_cold(tokens)

        times = {"openblas": 6.0, "mkl": 7.0}[blas]
        forms = {f"generate_step, stock BLAS ({blas} for us)": (theirs, Target(1 / times))}
        await bench.compare("stock", f"{tokens:,} cold", "ms", ours, forms, runs=bench.plan.stock_runs)


RUNNERS: dict[Name, Callable[[Bench], Awaitable[None]]] = {
    Name.HOT: hot,
    Name.DECODE: decode,
    Name.STREAMS: streams,
    Name.MIXED: mixed,
    Name.WARM: warm,
    Name.PREFILL: prefill,
    Name.GAP: gap,
}
