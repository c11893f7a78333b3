"""Short prompts that wait at the same time are prefilled in one chunk, and get the answers that they get alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
import pytest_asyncio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.engine.conftest import FolderOf
from tests.engine.runs import (
    FEW_SHAPES,
    Outcome,
    Solo,
    become,
    begun,
    check_greedy,
    check_growth,
    job_of,
    outcome,
    prompt_of,
    running,
)
from warmkv_server.contract.generation import Job, Sampling
from warmkv_server.engine.cache.attention_shapes import AttentionShapes
from warmkv_server.engine.engine import Engine, Handle
from warmkv_server.engine.model import device, discover
from warmkv_server.errors import EngineError

pytestmark = pytest.mark.asyncio(loop_scope="module")

POISON = 7
"""A token that the model can't take; no prompt has it by chance."""

LENGTHY = 9
"""A token that the model doesn't take before the test lets it; no prompt has it by chance either."""

SHORT = 15
"""Tokens of the longest short prompt, all but its last token."""

CHUNK = 128
"""Room for eight of them."""


@dataclass
class Bench:
    """An engine whose model's thread the test can hold up, and the same model alone."""

    engine: Engine
    solo: Solo
    calls: list[tuple[int, int]] = field(default_factory=list)
    """(rows, tokens) of each call of the engine's model."""
    gate: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)
    memory_left: int = 1 << 30
    """Calls of several rows and tokens until memory runs out in one."""

    async def together(self, jobs: Sequence[Job]) -> list[Handle]:
        """Submit jobs while the thread is held up, so that it finds all of them at once."""
        self.gate.clear()
        self.held.clear()
        blocking = self.engine.submit(Job([LENGTHY] * 2))
        await asyncio.to_thread(self.held.wait)
        handles = [self.engine.submit(job) for job in jobs]
        self.calls.clear()
        self.gate.set()
        await outcome(blocking)
        return handles

    async def outcomes(self, jobs: Sequence[Job]) -> list[Outcome]:
        return await asyncio.gather(*(outcome(handle) for handle in await self.together(jobs)))

    @property
    def joint(self) -> list[tuple[int, int]]:
        """Calls that prefilled several rows."""
        return [(rows, tokens) for rows, tokens in self.calls if rows > 1 and tokens > 1]


@asynccontextmanager
async def watched(folder: Path, shapes: AttentionShapes | None, short_prompt: int) -> AsyncIterator[Bench]:
    """Such an engine."""
    found: list[Bench] = []

    def subclass(real: type[Any]) -> type[Any]:
        def call(self: Any, inputs: mx.array, *rest: Any, **options: Any) -> Any:
            rows, tokens = inputs.shape
            if found:
                bench = found[0]
                bench.calls.append((rows, tokens))
                said = cast(list[int], inputs.flatten().tolist())
                if POISON in said:
                    raise RuntimeError("can't take a token")
                if LENGTHY in said:
                    bench.held.set()
                    bench.gate.wait()
                if rows > 1 and tokens > 1:
                    bench.memory_left -= 1
                    if bench.memory_left == 0:
                        raise MemoryError
            return real.__call__(self, inputs, *rest, **options)

        return type("Watched", (real,), {"__call__": call})

    with pytest.MonkeyPatch.context() as patch:
        solo = Solo(folder)
        patch.setattr(discover, "attention_shapes", lambda *_: shapes)
        become(patch, subclass)
        patch.setattr(device, "short_prompt", lambda: short_prompt)
        async with running(folder, max_batch=8, prefill_chunk=CHUNK) as engine:
            found.append(Bench(engine, solo))
            yield found[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[None, FEW_SHAPES], ids=["any", "few"])
async def bench(request: pytest.FixtureRequest, folder_of: FolderOf) -> AsyncIterator[Bench]:
    async with watched(folder_of("llama"), request.param, SHORT) as bench:
        yield bench


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, SHORT + 1), min_size=2, max_size=8), count=st.integers(1, 6))
@example([SHORT + 1] * 3, 4)
@example([1, 1], 3)
@example([12, 13, 14, 15, 16], 1)
async def test_answers_are_those_of_running_alone(bench: Bench, lengths: list[int], count: int) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    for prompt, got in zip(prompts, await bench.outcomes([job_of(p, count) for p in prompts]), strict=True):
        check_greedy(got.tokens, bench.solo.answer(prompt, count))
        assert got.finished.completion == tuple(got.tokens)
        assert len(got.tokens) == count
        check_growth(got.finished.growth, 0, len(prompt) + count)


async def test_they_take_one_chunk_and_one_step(bench: Bench) -> None:
    await bench.outcomes([job_of(prompt_of(length, length), 3) for length in (14, 15, 16)])
    assert bench.joint in ([(3, 15)], [(3, FEW_SHAPES.tokens(15))])
    assert {rows for rows, tokens in bench.calls if rows * tokens <= 3} == {3}


async def test_longer_prompts_others_of_unlike_length_and_those_without_an_answer_do_not(bench: Bench) -> None:
    await bench.outcomes([job_of(prompt_of(SHORT + 2, seed), 2) for seed in range(2)])
    assert bench.joint == []
    await bench.outcomes([job_of(prompt_of(length), 2) for length in (3, 16)])
    assert bench.joint == []
    await bench.outcomes([Job(prompt_of(10, seed)) for seed in range(2)])
    assert bench.joint == []


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.9, seed=11),
        Sampling(repetition_penalty=1.7),
        Sampling(presence_penalty=3.0, frequency_penalty=2.0, logit_bias={20: 4.0}),
    ],
)
async def test_sampling_is_that_of_running_alone(bench: Bench, sampling: Sampling) -> None:
    job = job_of(prompt_of(12), 8, sampling=sampling, top_logprobs=2)
    alone = await outcome(bench.engine.submit(job))
    got, _, _ = await bench.outcomes([job, job_of(prompt_of(13, 3), 8), job_of(prompt_of(14, 4), 8)])
    assert bench.joint
    assert got.tokens == alone.tokens
    for here, there in zip(got.logprobs, alone.logprobs, strict=True):
        assert here.logprob == pytest.approx(there.logprob, abs=2e-2)


async def test_they_join_those_that_decode_already(bench: Bench) -> None:
    beside = await begun(bench.engine.submit(job_of(prompt_of(16), 400)))
    got = await bench.outcomes([job_of(prompt_of(length, length), 5) for length in (14, 15)])
    for length, each in zip((14, 15), got, strict=True):
        check_greedy(each.tokens, bench.solo.answer(prompt_of(length, length), 5))
    assert (3, 1) in bench.calls
    beside.cancel()
    await outcome(beside)


@pytest.mark.parametrize("place", [0, 5, 11])
async def test_a_prompt_that_cannot_be_computed_fails_alone(bench: Bench, place: int) -> None:
    broken = prompt_of(12)
    broken[place] = POISON
    mates = [prompt_of(12, 1), prompt_of(13, 2)]
    handles = await bench.together([job_of(prompt, 4) for prompt in (mates[0], broken, mates[1])])
    with pytest.raises(EngineError):
        await outcome(handles[1])
    for prompt, handle in zip(mates, (handles[0], handles[2]), strict=True):
        got = await outcome(handle)
        check_greedy(got.tokens, bench.solo.answer(prompt, 4))
        check_growth(got.finished.growth, 0, len(prompt) + 4)
    assert bench.engine.stats().in_flight_bytes == 0


async def test_one_whose_sampling_fails(bench: Bench) -> None:
    prompts = [prompt_of(12, seed) for seed in range(3)]
    broken = job_of(prompts[1], 4, sampling=Sampling(temperature=1.0, min_p=7.0))
    handles = await bench.together([job_of(prompts[0], 4), broken, job_of(prompts[2], 4)])
    with pytest.raises(EngineError):
        await outcome(handles[1])
    for number in (0, 2):
        check_greedy((await outcome(handles[number])).tokens, bench.solo.answer(prompts[number], 4))


async def test_memory_that_runs_out_in_a_joint_chunk(bench: Bench) -> None:
    """All of them begin again, one after the other."""
    bench.memory_left = 1
    prompts = [prompt_of(10 + seed, seed) for seed in range(3)]
    for prompt, got in zip(prompts, await bench.outcomes([job_of(p, 4) for p in prompts]), strict=True):
        check_greedy(got.tokens, bench.solo.answer(prompt, 4))
        check_growth(got.finished.growth, 0, len(prompt) + 4)
    assert bench.memory_left == 0
    bench.memory_left = 1 << 30


async def test_one_of_them_is_cancelled(bench: Bench) -> None:
    prompts = [prompt_of(12, seed) for seed in range(3)]
    handles = await bench.together([job_of(prompt, 60) for prompt in prompts])
    await begun(handles[1])
    handles[1].cancel()
    finished = (await outcome(handles[1])).finished
    check_growth(finished.growth, 0, 12 + len(finished.completion))
    for number in (0, 2):
        check_greedy((await outcome(handles[number])).tokens, bench.solo.answer(prompts[number], 60))


async def test_all_of_them_fail_beside_one_that_decodes(bench: Bench) -> None:
    """It goes on."""
    beside = await begun(bench.engine.submit(job_of(prompt_of(16), 200)))
    broken = [job_of(prompt_of(14 + n), 4, sampling=Sampling(temperature=1.0, min_p=7.0)) for n in range(2)]
    for handle in await bench.together(broken):
        with pytest.raises(EngineError):
            await outcome(handle)
    assert bench.joint
    assert len((await outcome(beside)).finished.completion) == 200


async def test_where_none_is_short_not_even_single_tokens_share_a_step_before_their_first(folder_of: FolderOf) -> None:
    async with watched(folder_of("llama"), None, 0) as bench:
        await bench.outcomes([job_of(prompt_of(1, seed), 3) for seed in range(3)])
        assert [rows for rows, _ in bench.calls[:3]] == [1, 1, 1]
