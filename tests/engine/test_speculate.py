"""Guessing tokens and checking them in one step changes no answer and leaves no trace of a wrong guess."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
import pytest_asyncio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.engine.conftest import FolderOf
from tests.engine.parrot import write_parrot
from tests.engine.runs import (
    Outcome,
    Solo,
    after,
    become,
    check_greedy,
    check_growth,
    counting,
    job_of,
    outcome,
    prompt_of,
    running,
)
from tests.engine.spans import grown
from tests.engine.tokenizers import built_in, ids
from warmkv_server.contract.generation import Answer, Delta, Finish, Job, Sampling
from warmkv_server.contract.kv import Growth
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.steps.sequence import Sequence as Stream
from warmkv_server.engine.steps.speculate import Proposal, Speculator
from warmkv_server.errors import OperatorError

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = prompt_of(50)
ANSWER = 40
LIMIT = 6


@dataclass
class Bench:
    """An engine that speculates, the same model alone, and what the engine's model was called with."""

    engine: Engine
    solo: Solo
    calls: list[tuple[int, int]] = field(default_factory=list)
    """(rows, tokens) of each."""

    @property
    def checks(self) -> list[int]:
        """Tokens of each step that checked a guess. (No prefill chunk here is as short.)"""
        return [tokens for rows, tokens in self.calls if rows == 1 and 1 < tokens < 15]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["llama", "deepseek_v3"])
async def bench(request: pytest.FixtureRequest, folder_of: FolderOf) -> AsyncIterator[Bench]:
    """Keys and values of one shape, and of two."""
    bench = Bench(None, Solo(folder_of(request.param)))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        become(patch, counting(bench.calls))
        async with running(folder_of(request.param), speculate_tokens=LIMIT) as bench.engine:
            yield bench


Plan = Sequence[tuple[int, int]]
"""Of each guess, how many tokens are right and how many wrong ones follow."""


@contextmanager
def guessing(truth: Sequence[int], plan: Plan) -> Iterator[None]:
    """Let the engine guess as planned, over and over, about an answer that begins so."""
    step = 0

    def propose(_: Speculator, stream: Stream) -> Proposal:
        nonlocal step
        right, wrong = plan[step % len(plan)]
        step += 1
        behind = truth[len(stream.completion) + (not stream.sent) :]
        pending = stream.pending
        assert pending is not None
        pending.read()
        return Proposal([*behind[:right], *((token + 1) % 300 for token in [*behind[right:], *[7] * wrong][:wrong])])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speculator, "propose", propose)
        yield


NONE: Plan = [(0, 0)]


async def plain(engine: Engine, job: Job) -> Outcome:
    """Its outcome without guesses."""
    with guessing((), NONE):
        return await outcome(engine.submit(job))


def equal_words(left: Growth, right: Growth) -> float:
    """The share of stored values that are equal."""
    same = total = 0
    for kind, tensors in left.tensors.items():
        for name, array in tensors.items():
            other = right.tensors[kind][name]
            assert array.shape == other.shape
            same += cast(int, mx.sum(array == other).item())
            total += array.size
    return same / total


@settings(max_examples=12, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
@example([(5, 0)])
@example([(0, 5)])
@example([(2, 3), (0, 0), (0, 1), (5, 5)])
async def test_no_guess_changes_the_answer_or_what_is_kept(bench: Bench, plan: Plan) -> None:
    job = job_of(PROMPT, ANSWER)
    alone = await plain(bench.engine, job)
    with guessing(alone.tokens, plan):
        got = await outcome(bench.engine.submit(job))
    compared = check_greedy(got.tokens, bench.solo.answer(PROMPT, ANSWER))
    finished = got.finished
    assert (finished.finish, finished.completion) == (Finish.LENGTH, tuple(got.tokens))
    assert [len(delta.token_ids) for delta in got.deltas] == [1] * ANSWER
    check_growth(finished.growth, 0, len(PROMPT) + ANSWER)
    if compared == ANSWER:
        assert equal_words(finished.growth, alone.finished.growth) >= 0.98
    tokens = [*PROMPT, *got.tokens, *prompt_of(3, seed=5)]
    spans = grown([finished.growth], len(PROMPT) + ANSWER)
    more = await plain(bench.engine, after(tokens, spans, len(PROMPT) + ANSWER, Answer(max_tokens=5, ignore_eos=True)))
    check_greedy(more.tokens, bench.solo.answer(tokens, 5))


async def test_good_guesses_save_steps(bench: Bench) -> None:
    truth = [step.token for step in bench.solo.answer(PROMPT, ANSWER)]
    before = bench.engine.stats()
    bench.calls.clear()
    with guessing(truth, [(3, 0)]):
        await outcome(bench.engine.submit(job_of(PROMPT, ANSWER)))
    assert len(bench.checks) <= ANSWER // 3
    now = bench.engine.stats()
    assert now.accepted_tokens - before.accepted_tokens >= ANSWER // 2
    assert now.decoded_tokens - before.decoded_tokens == ANSWER


@pytest.mark.parametrize("plan", [[(4, 0)], [(0, 4)], [(1, 3)]])
async def test_cancelled_in_the_middle(bench: Bench, plan: Plan) -> None:
    truth = [step.token for step in bench.solo.answer(PROMPT, ANSWER)]
    with guessing(truth, plan):
        handle = bench.engine.submit(job_of(PROMPT, 3000))
        got = Outcome()
        async for event in handle:
            got.events.append(event)
            if len(got.tokens) == 5:
                handle.cancel()
    finished = got.finished
    assert finished.finish is Finish.CANCELLED
    assert finished.completion == tuple(got.tokens)
    check_greedy(got.tokens, bench.solo.answer(PROMPT, ANSWER))
    held = len(PROMPT) + len(got.tokens)
    check_growth(finished.growth, 0, held)
    tokens = [*PROMPT, *got.tokens, 9, 10]
    again = after(tokens, grown([finished.growth], held), held, Answer(max_tokens=4, ignore_eos=True))
    check_greedy((await plain(bench.engine, again)).tokens, bench.solo.answer(tokens, 4))


async def test_a_stream_that_joins_ends_it_and_the_last_one_left_begins_again(bench: Bench) -> None:
    prompts = [PROMPT, prompt_of(51, seed=1)]
    truth = [step.token for step in bench.solo.answer(PROMPT, 80)]
    bench.calls.clear()
    with guessing(truth, [(2, 2)]):
        first = bench.engine.submit(job_of(PROMPT, 80))
        got = Outcome()
        async for event in first:
            got.events.append(event)
            if isinstance(event, Delta) and len(got.tokens) == 1:
                second = bench.engine.submit(job_of(prompts[1], 10))
        other = await outcome(second)
    check_greedy(got.tokens, bench.solo.answer(PROMPT, 80))
    check_greedy(other.tokens, bench.solo.answer(prompts[1], 10))
    check_growth(got.finished.growth, 0, len(PROMPT) + 80)
    check_growth(other.finished.growth, 0, len(prompts[1]) + 10)
    together = [place for place, (rows, _) in enumerate(bench.calls) if rows == 2]
    assert len(together) >= 8
    shared = bench.calls[together[0] : together[-1] + 1]
    assert all(call == (2, 1) for call in shared), "nobody guesses while two decode"
    assert any(call == (1, 5) for call in bench.calls[together[-1] :])


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0, seed=3), Sampling(temperature=0.8, top_p=0.9, seed=4), Sampling(seed=1)]
)
async def test_sampled_tokens_and_logprobs_are_those_of_deciding_one_by_one(bench: Bench, sampling: Sampling) -> None:
    job = job_of(PROMPT, 20, sampling=sampling, top_logprobs=2)
    alone = await plain(bench.engine, job)
    bench.calls.clear()
    with guessing(alone.tokens, [(3, 2), (4, 0)]):
        got = await outcome(bench.engine.submit(job))
    assert len(bench.checks) >= 4
    assert got.tokens == alone.tokens
    for one, another in zip(got.logprobs, alone.logprobs, strict=True):
        assert abs(one.logprob - another.logprob) < 2e-2


async def test_a_penalty_looks_at_every_token_before_and_is_not_guessed(bench: Bench) -> None:
    prompt = [9, 10, 11, 12] * 12
    job = job_of(prompt, 20, sampling=Sampling(repetition_penalty=1.1))
    bench.calls.clear()
    await outcome(bench.engine.submit(job))
    assert bench.checks == []


async def test_an_answer_that_repeats_itself_takes_fewer_steps() -> None:
    """With nothing planned: the built-in model goes round in circles here, and the lookup finds them."""
    prompt, calls = [2, *ids(built_in(), "Once upon a time there was")], list[tuple[int, int]]()
    with pytest.MonkeyPatch.context() as patch:
        become(patch, counting(calls))
        async with running("builtin:tiny", speculate_tokens=LIMIT) as engine:
            alone = await plain(engine, job_of(prompt, 120))
            bench = Bench(engine, Solo("builtin:tiny"), calls)
            calls.clear()
            got = await outcome(engine.submit(job_of(prompt, 120)))
    assert len(calls) < 120 * 0.6
    assert max(bench.checks) == LIMIT + 1
    check_greedy(got.tokens, bench.solo.answer(prompt, 120))
    check_growth(got.finished.growth, 0, len(prompt) + 120)
    assert equal_words(got.finished.growth, alone.finished.growth) >= 0.98


@pytest.mark.parametrize("name", ["gemma3_text", "llama4_chunked", "qwen3_5", "falcon_h1"])
async def test_refused_where_a_wrong_guess_could_not_be_taken_back(name: str, folder_of: FolderOf) -> None:
    with pytest.raises(OperatorError, match="--speculate-tokens"):
        async with running(folder_of(name), speculate_tokens=4):
            pass


TEXT = " Grey birds fly south when winter comes."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parrots(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Engine, list[int]]]:
    """An engine whose model says the text, and a context that has it already and asks for it again."""
    folder: Path = tmp_path_factory.mktemp("parrots") / "parrot"
    cue = write_parrot(folder, [TEXT])[TEXT]
    opening = [2000, 2001, cue]
    said = [*opening, *ids(built_in(), TEXT), 1]
    async with running(folder, speculate_tokens=16) as engine:
        yield engine, [*said, *said, *opening]


@pytest.mark.parametrize(
    "ends", [{"stop": ("south",)}, {"stop": ("fly so", "zebra")}, {"stop": ("comes.",)}, {"max_tokens": 4}, {}]
)
async def test_an_answer_that_ends_within_a_guess_ends_there(
    parrots: tuple[Engine, list[int]], ends: dict[str, Any]
) -> None:
    engine, prompt = parrots
    job = Job(prompt, answer=Answer(**ends))
    alone = await plain(engine, job)
    before = engine.stats()
    got = await outcome(engine.submit(job))
    assert engine.stats().accepted_tokens > before.accepted_tokens
    assert (got.text, got.tokens) == (alone.text, alone.tokens)
    for attribute in ("finish", "matched_stop", "completion"):
        assert getattr(got.finished, attribute) == getattr(alone.finished, attribute)
    check_growth(got.finished.growth, 0, len(prompt) + len(got.finished.completion))
    assert equal_words(got.finished.growth, alone.finished.growth) >= 0.98
