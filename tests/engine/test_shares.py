"""Tenants share what runs: one that has more gives way, and goes on later as if nothing had been."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES
from tests.engine.runs import Outcome, after, begun, check_growth, job_of, outcome, prompt_of, running
from tests.engine.spans import grown, needed
from warmkv_server.contract.generation import Answer, Delta, Finish, Job, Progress, Sampling, Started
from warmkv_server.engine.engine import Engine, Handle
from warmkv_server.engine.steps.schedule import together

KINDS = ["llama", "deepseek_v3", "gemma3_text", "llama4_chunked", "mamba2", "qwen3_5", "falcon_h1"]

SAMPLED = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.5, seed=11)


def red(prompt: Sequence[int], max_tokens: int, **answer: Any) -> Job:
    return replace(job_of(prompt, max_tokens, **answer), tenant="red")


def blue(number: int, max_tokens: int = 2) -> Job:
    return replace(job_of(prompt_of(20, seed=100 + number), max_tokens), tenant="blue")


async def read(handle: Handle, got: Outcome, tokens: int) -> None:
    """Go on reading until there are so many tokens, or it has ended."""
    async for event in handle:
        got.events.append(event)
        if len(got.tokens) >= tokens:
            return


@asynccontextmanager
async def two_rows(folder_of: FolderOf, name: str, **settings: Any) -> AsyncIterator[Engine]:
    async with running(folder_of(name), FAMILIES[name].group_size, max_batch=2, **settings) as engine:
        yield engine


async def interrupted(engine: Engine, job: Job, places: Sequence[int]) -> Outcome:
    """The job as the second of red's two, which gives way to one of blue's after so many tokens each time."""
    first = await begun(engine.submit(red(prompt_of(20), 3000)))
    handle, got = engine.submit(job), Outcome()
    for number, place in enumerate(places):
        await read(handle, got, place)
        before = engine.stats().preempted
        assert (await outcome(engine.submit(blue(number)))).finished.finish is Finish.LENGTH
        assert engine.stats().preempted == before + 1
    await read(handle, got, 1 << 30)
    first.cancel()
    await outcome(first)
    stats = engine.stats()
    assert (stats.queue_depth, stats.prefilling, stats.decoding, stats.in_flight_bytes) == (0, 0, 0, 0)
    return got


@pytest.mark.parametrize(
    ("name", "sampling"), [*((name, Sampling()) for name in KINDS), *((name, SAMPLED) for name in KINDS[::2])]
)
async def test_what_gives_way_goes_on_token_for_token(name: str, sampling: Sampling, folder_of: FolderOf) -> None:
    """After its first token, before and behind words that were gathered; its KV is whole and can be gone on from."""
    count = 250
    job = red(prompt_of(400), count, sampling=sampling, top_logprobs=3)
    async with two_rows(folder_of, name) as engine:
        beside = await begun(engine.submit(red(prompt_of(20), 3000)))
        alone = await outcome(engine.submit(job))
        beside.cancel()
        await outcome(beside)
        got = await interrupted(engine, job, (1, 2, 70))
        assert got.tokens == alone.tokens
        assert got.text == alone.text
        for one, other in zip(got.logprobs, alone.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
        if name == "llama":
            assert got.logprobs == alone.logprobs
        assert sum(isinstance(event, Started) for event in got.events) == 1
        check_growth(got.finished.growth, 0, 400 + count)
        assert got.finished.growth.snapshots.keys() == alone.finished.growth.snapshots.keys()
        held = 400 + count
        tokens = [*prompt_of(400), *got.tokens, 9, 10]
        answers = []
        for each in (got, alone):
            spans = needed(grown([each.finished.growth], held), engine.info.layout, held)
            more = after(tokens, spans, held, Answer(max_tokens=4, ignore_eos=True))
            answers.append((await outcome(engine.submit(more))).tokens)
        assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5"])
async def test_it_gives_way_in_the_middle_of_its_prompt(name: str, folder_of: FolderOf) -> None:
    prompt = prompt_of(2000)
    async with two_rows(folder_of, name) as engine:
        beside = await begun(engine.submit(red(prompt_of(20), 3000)))
        alone = await outcome(engine.submit(red(prompt, 10)))
        handle, got = engine.submit(red(prompt, 10)), Outcome()
        for number in range(3):
            async for event in handle:
                got.events.append(event)
                if isinstance(event, Progress) and event.done > 300 * (number + 1):
                    break
            await outcome(engine.submit(blue(number)))
        assert engine.stats().preempted == 3
        async for event in handle:
            got.events.append(event)
        assert got.tokens == alone.tokens
        check_growth(got.finished.growth, 0, 2010)
        progress = [event.done for event in got.events if isinstance(event, Progress)]
        assert progress == sorted(set(progress))
        beside.cancel()
        await outcome(beside)


async def test_a_stop_string_and_held_back_text_survive(folder_of: FolderOf) -> None:
    async with two_rows(folder_of, "llama") as engine:
        beside = await begun(engine.submit(red(prompt_of(20), 3000)))
        plain = await outcome(engine.submit(red(prompt_of(400), 250)))
        head, stop = ("".join(delta.text for delta in plain.deltas[a:b]) for a, b in ((0, 20), (20, 220)))
        assert head + stop in plain.text
        job = red(prompt_of(400), 250, stop=(stop,))
        alone = await outcome(engine.submit(job))
        beside.cancel()
        await outcome(beside)
        assert alone.finished.finish is Finish.STOP_SEQUENCE
        got = await interrupted(engine, job, (10, 50))
        assert (got.tokens, got.text, got.finished.matched_stop) == (alone.tokens, alone.text, stop)


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
async def test_a_cancelled_one_that_gave_way_keeps_every_token_that_was_sent(name: str, folder_of: FolderOf) -> None:
    async with two_rows(folder_of, name) as engine:
        first = await begun(engine.submit(red(prompt_of(20), 3000)))
        second, got = engine.submit(red(prompt_of(400), 3000)), Outcome()
        await read(second, got, 1)
        third = await begun(engine.submit(blue(0, 3000)))
        second.cancel()
        await read(second, got, 1 << 30)
        assert got.finished.finish is Finish.CANCELLED
        assert got.finished.completion == tuple(got.tokens)
        check_growth(got.finished.growth, 0, 400 + len(got.tokens))
        if name == "qwen3_5":
            assert 400 + len(got.tokens) in got.finished.growth.snapshots
        for handle in (first, third):
            handle.cancel()
            await outcome(handle)
        assert engine.stats().in_flight_bytes == 0


async def test_rows_are_shared_while_two_tenants_ask(folder_of: FolderOf) -> None:
    """Eight of red's fill the batch. Blue's first token comes at once, and both go on with half."""
    async with running(folder_of("llama"), max_batch=8) as engine:
        reds = [engine.submit(red(prompt_of(20 + n), 3000)) for n in range(12)]
        for handle in reds[:8]:
            await begun(handle)
        blues = [engine.submit(blue(n, 3000)) for n in range(12)]
        for handle in blues[:4]:
            await begun(handle)
        assert [handle.phase for handle in blues[4:]] == ["queued"] * 8
        assert engine.stats().preempted == 4
        decoded = Counter[str]()
        enough = asyncio.Event()

        async def count(tenant: str, handle: Handle) -> None:
            async for event in handle:
                if isinstance(event, Delta):
                    decoded[tenant] += len(event.token_ids)
                    if min(decoded["red"], decoded["blue"]) > 400:
                        enough.set()

        tenants = [("red", handle) for handle in reds] + [("blue", handle) for handle in blues]
        counting = [asyncio.create_task(count(*each)) for each in tenants]
        await asyncio.sleep(0)  # what came before
        decoded.clear()
        await enough.wait()
        assert min(decoded.values()) > 0.4 * decoded.total()
        for handle in (*reds, *blues):
            handle.cancel()
        await asyncio.gather(*counting)
        assert engine.stats().in_flight_bytes == 0


async def test_memory_is_shared_and_stays_within_the_budget(folder_of: FolderOf) -> None:
    async with running(folder_of("llama")) as engine:
        budget = together([engine.needs.of_job(job_of(prompt_of(40), 1000)) for _ in range(8)])
    async with running(folder_of("llama"), inflight_bytes=budget) as engine:
        reds = [engine.submit(red(prompt_of(40), 1000)) for _ in range(10)]
        for handle in reds[:8]:
            await begun(handle)
        blues = [engine.submit(replace(red(prompt_of(40), 1000), tenant="blue")) for _ in range(10)]
        for handle in blues[:4]:
            await begun(handle)
        assert sum(handle.phase == "decoding" for handle in blues) in (3, 4)
        assert engine.stats().preempted >= 4
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, engine.stats().in_flight_bytes)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        for handle in (*reds, *blues):
            assert len((await outcome(handle)).finished.completion) == 1000
        watching.cancel()
        assert most <= budget
        assert engine.stats().in_flight_bytes == 0
