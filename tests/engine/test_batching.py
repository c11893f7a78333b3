"""Sequences that run together get the answers that they get alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import mlx.core as mx
import pytest
import pytest_asyncio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.engine.conftest import FolderOf
from tests.engine.runs import (
    Outcome,
    Solo,
    Step,
    after,
    become,
    check_greedy,
    check_growth,
    counting,
    job_of,
    outcomes,
    prompt_of,
    running,
)
from tests.engine.spans import grown, needed
from warmkv_server.contract.generation import Answer, Delta, Finish, Sampling
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.model.memory_need import MemoryNeed
from warmkv_server.engine.output.sampling import Choice, Chooser
from warmkv_server.engine.steps.batch import Batch
from warmkv_server.engine.steps.sequence import Sequence

pytestmark = pytest.mark.asyncio(loop_scope="module")

KINDS = ["llama", "deepseek_v3", "gemma3_text", "gemma4_shared_kv", "llama4_chunked", "qwen3_5", "falcon_h1"]
"""A family of each kind of cache."""

LONGEST = 10


@dataclass(frozen=True)
class Agent:
    """One request among others.

    Attributes:
        prompt: tokens of it.
        after: tokens that the others together must have got before it joins.
        cancel_at: tokens after which it is cancelled; None for never.
    """

    prompt: int
    max_tokens: int = LONGEST
    after: int = 0
    cancel_at: int | None = None


@dataclass
class Bench:
    """An engine, and the same model alone."""

    name: str
    engine: Engine
    solo: Solo
    calls: list[tuple[int, int]]
    """(rows, tokens) of each call of the engine's model."""
    _answers: dict[int, list[Step]] = field(default_factory=dict)

    def alone(self, prompt: int) -> list[Step]:
        if prompt not in self._answers:
            self._answers[prompt] = self.solo.answer(prompt_of(prompt), LONGEST)
        return self._answers[prompt]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def bench(request: pytest.FixtureRequest, folder_of: FolderOf) -> AsyncIterator[Bench]:
    folder, calls = folder_of(request.param), list[tuple[int, int]]()
    solo = Solo(folder)
    with pytest.MonkeyPatch.context() as patch:
        become(patch, counting(calls))
        async with running(folder, max_batch=4) as engine:
            yield Bench(request.param, engine, solo, calls)


async def run(engine: Engine, agents: list[Agent]) -> list[Outcome]:
    """Let them come and go as they say. One whose moment never comes joins when nobody is left to wait for."""
    seen, running_now = 0, 0
    changed = asyncio.Condition()

    async def one(agent: Agent) -> Outcome:
        nonlocal seen, running_now
        async with changed:
            await changed.wait_for(lambda: seen >= agent.after or not running_now)
            running_now += 1
        handle = engine.submit(job_of(prompt_of(agent.prompt), agent.max_tokens))
        got = Outcome()
        async for event in handle:
            got.events.append(event)
            if isinstance(event, Delta):
                async with changed:
                    seen += 1
                    changed.notify_all()
                if len(got.tokens) == agent.cancel_at:
                    handle.cancel()
        async with changed:
            running_now -= 1
            changed.notify_all()
        return got

    return await asyncio.gather(*(one(agent) for agent in agents))


@settings(max_examples=6, deadline=None)
@given(
    agents=st.lists(
        st.builds(
            Agent,
            prompt=st.sampled_from([1, 2, 31, 32, 33, 34, 50, 64, 66, 90]),
            max_tokens=st.integers(1, LONGEST),
            after=st.integers(0, 10),
            cancel_at=st.none() | st.integers(1, LONGEST),
        ),
        min_size=3,
        max_size=6,
    )
)
@example([Agent(31, 3), Agent(32), Agent(33, 6), Agent(34, after=6, cancel_at=3), Agent(50, after=9)])
async def test_joining_and_leaving_changes_no_answer(bench: Bench, agents: list[Agent]) -> None:
    for agent, got in zip(agents, await run(bench.engine, agents), strict=True):
        check_greedy(got.tokens, bench.alone(agent.prompt))
        finished = got.finished
        assert finished.completion == tuple(got.tokens)
        check_growth(finished.growth, 0, agent.prompt + len(got.tokens))
        if finished.finish is Finish.CANCELLED:
            assert agent.cancel_at is not None
            assert agent.cancel_at <= len(got.tokens) <= agent.max_tokens
        else:
            assert (finished.finish, len(got.tokens)) == (Finish.LENGTH, agent.max_tokens)


async def test_agents_of_like_length_share_a_step(bench: Bench) -> None:
    """Otherwise this file would show nothing about batches. (Chunked caches don't merge: each row has its own step.)"""
    bench.calls.clear()
    agents = [Agent(prompt) for prompt in (18, 19, 20, 21)]
    got = await run(bench.engine, agents)
    assert max(rows for rows, _ in bench.calls) == (1 if bench.name == "llama4_chunked" else len(agents))
    compared = sum(
        check_greedy(each.tokens, bench.alone(agent.prompt)) for agent, each in zip(agents, got, strict=True)
    )
    assert compared > len(agents) * LONGEST // 2, "nearly every answer was unsure: the models show nothing"


async def test_what_a_row_of_a_batch_leaves_behind_carries_its_own_agent_on(bench: Bench) -> None:
    """Whether it ended, was cancelled, or ended last; recurrent state is one row's of many."""
    agents = [Agent(48, 3), Agent(49, LONGEST), Agent(50, LONGEST, cancel_at=4), Agent(51, 5)]
    for agent, got in zip(agents, await run(bench.engine, agents), strict=True):
        held = agent.prompt + len(got.tokens)
        spans = needed(grown([got.finished.growth], held), bench.engine.info.layout, held)
        tokens = [*prompt_of(agent.prompt), *got.tokens, *prompt_of(3, seed=5)]
        (more,) = await outcomes(bench.engine, [after(tokens, spans, held, Answer(max_tokens=4, ignore_eos=True))])
        check_greedy(more.tokens, bench.solo.answer(tokens, 4))


async def test_the_same_job_twice_is_the_same_bit_for_bit(bench: Bench) -> None:
    first, second = [(await outcomes(bench.engine, [job_of(prompt_of(70), 5, top_logprobs=4)]))[0] for _ in range(2)]
    assert first.logprobs == second.logprobs
    assert first.tokens == second.tokens


async def test_sequences_that_come_together_decode_together_from_their_second_token(
    folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So those of one length stay of one length, and none is padded."""
    calls: list[tuple[int, int]] = []
    become(monkeypatch, counting(calls))
    async with running(folder_of("llama"), max_decode_gap_ms=60_000) as engine:
        calls.clear()
        await outcomes(engine, [job_of(prompt_of(20, seed), 6) for seed in range(3)])
    assert [call for call in calls if call[1] == 1] == 3 * [(1, 1)] + 6 * [(3, 1)]


async def test_a_batch_has_a_mask_only_while_its_rows_differ_in_length(folder_of: FolderOf) -> None:
    solo = Solo(folder_of("llama"))
    rows = []
    for length in (5, 5, 7):
        caches = solo.loaded.cache_map.empty_caches(solo.loaded.model)
        solo.loaded.model(mx.array([prompt_of(length)]), cache=caches)
        mx.eval(kinds.arrays(caches))
        sequence = Sequence(length, job_of(prompt_of(length), 4), solo.loaded, MemoryNeed(0, 0, 0), caches, length)
        sequence.collect()
        sequence.pending = Choice(mx.array([1]))
        sequence.chooser = Chooser(Sampling(), prompt_of(length), 320, 0)
        rows.append(sequence)
    batch = Batch()

    def masked() -> bool:
        return batch.caches[0].make_mask(1) is not None

    for row in rows[:2]:
        batch.join(row)
    batch.drain()
    assert not masked()
    batch.join(rows[2])
    batch.drain()
    assert masked()
    batch.leave([rows[2]])
    assert not masked()
