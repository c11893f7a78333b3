"""Something breaks inside: whom it concerns gets an error with an id that the log has too, and all else goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import mlx.core as mx
import pytest
import pytest_asyncio
from mlx_lm.models import llama

from tests.engine.conftest import FolderOf
from tests.engine.runs import Outcome, Solo, after, become, begun, check_greedy, job_of, outcome, prompt_of, running
from warmkv_server.contract.generation import Answer, Job, Sampling
from warmkv_server.contract.kv import Span
from warmkv_server.engine.engine import Engine, Handle
from warmkv_server.engine.output import sampling
from warmkv_server.engine.output.answer_text import AnswerText
from warmkv_server.engine.output.constraint import Mask
from warmkv_server.engine.steps import batch
from warmkv_server.errors import EngineError

POISON = 7
"""A token that the model can't take; no prompt has it by chance."""


class Allergic(llama.Model):
    """A real model that breaks on one token, whichever row it is in."""

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        if POISON in inputs.flatten().tolist():  # type: ignore[operator]
            raise RuntimeError(f"can't take token {POISON}")
        logits: mx.array = super().__call__(inputs, cache, input_embeddings)
        return logits


@pytest_asyncio.fixture
async def engine(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    become(monkeypatch, lambda _: Allergic)
    async with running(folder_of("llama")) as engine:
        yield engine


@pytest.fixture(scope="module")
def solo(folder_of: FolderOf) -> Solo:
    return Solo(folder_of("llama"))


async def fails(handle: Handle, caplog: pytest.LogCaptureFixture) -> str:
    """Read it to its error; its id."""
    with pytest.raises(EngineError) as caught:
        await outcome(handle)
    error = caught.value
    assert error.error_id in str(error)
    assert "token" not in str(error), "what broke is for the log alone"
    (record,) = [record for record in caplog.records if error.error_id in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    return error.error_id


async def still_works(engine: Engine, solo: Solo) -> None:
    """Alone, together, and with nothing left behind by what failed."""
    handles = [engine.submit(job_of(prompt_of(20 + n, seed=9), 5)) for n in range(3)]
    for n, handle in enumerate(handles):
        check_greedy((await outcome(handle)).tokens, solo.answer(prompt_of(20 + n, seed=9), 5))
    stats = engine.stats()
    assert (stats.queue_depth, stats.prefilling, stats.decoding, stats.in_flight_bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("place", [0, 50, 69])
@pytest.mark.parametrize("answers", [True, False])
async def test_a_prefill_that_fails(
    place: int, answers: bool, engine: Engine, solo: Solo, caplog: pytest.LogCaptureFixture
) -> None:
    beside = await begun(engine.submit(job_of(prompt_of(40), 60)))
    prompt = prompt_of(70)
    prompt[place] = POISON
    broken = engine.submit(job_of(prompt, 5) if answers else Job(prompt))
    waiting = engine.submit(job_of(prompt_of(90), 5))
    await fails(broken, caplog)
    assert broken.phase == "done"
    check_greedy((await outcome(waiting)).tokens, solo.answer(prompt_of(90), 5))
    assert len((await outcome(beside)).finished.completion) == 60
    await still_works(engine, solo)


async def test_a_reused_prefix_that_is_not_one(engine: Engine, solo: Solo, caplog: pytest.LogCaptureFixture) -> None:
    await fails(engine.submit(after(prompt_of(30), [Span(0, 20, {})], 20, Answer(max_tokens=3))), caplog)
    await still_works(engine, solo)


async def test_a_decode_step_that_fails(engine: Engine, solo: Solo, caplog: pytest.LogCaptureFixture) -> None:
    """It is one operation for all rows of a batch: they fail together, others don't."""
    mates = [await begun(engine.submit(job_of(prompt_of(40 + n), 3000))) for n in range(2)]
    far = await begun(engine.submit(job_of(prompt_of(400), 60)))
    prefilling = engine.submit(job_of(prompt_of(1000), 5))
    poisoned = engine.submit(job_of(prompt_of(60), 5, sampling=Sampling(logit_bias={POISON: 1000.0})))
    ids = {await fails(handle, caplog) for handle in (poisoned, *mates)}
    assert len(ids) == 1, "one failure is one entry of the log"
    check_greedy((await outcome(prefilling)).tokens, solo.answer(prompt_of(1000), 5))
    assert len((await outcome(far)).finished.completion) == 60
    await still_works(engine, solo)


async def test_sampling_that_fails_at_the_first_token(
    engine: Engine, solo: Solo, caplog: pytest.LogCaptureFixture
) -> None:
    beside = await begun(engine.submit(job_of(prompt_of(40), 60)))
    await fails(engine.submit(job_of(prompt_of(42), 5, sampling=Sampling(temperature=1.0, min_p=7.0))), caplog)
    assert len((await outcome(beside)).finished.completion) == 60
    await still_works(engine, solo)


class Sober(sampling.Chooser):
    """Breaks at the third token of those who ask for one logprob."""

    def choose(
        self, logits: mx.array, position: int, last: mx.array | None, mask: Mask | None = None
    ) -> sampling.Choice:
        if self.top_logprobs == 1 and position == 42 + 2:
            raise RuntimeError("can't choose a token")
        return super().choose(logits, position, last, mask)


async def test_sampling_that_fails_in_a_batch_ends_only_its_own_row(
    folder_of: FolderOf, solo: Solo, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("warmkv_server.engine.steps.sequence.Chooser", Sober)
    async with running(folder_of("llama")) as engine:
        mates = [engine.submit(job_of(prompt_of(40 + n), 30)) for n in (0, 1, 3)]
        broken = engine.submit(job_of(prompt_of(42), 30, top_logprobs=1))
        await fails(broken, caplog)
        for n, mate in zip((0, 1, 3), mates, strict=True):
            check_greedy((await outcome(mate)).tokens, solo.answer(prompt_of(40 + n), 30))
        await still_works(engine, solo)


async def test_text_that_cannot_be_spelled_ends_only_its_own_row(
    folder_of: FolderOf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spell, unknown = AnswerText.push, 10

    def push(self: AnswerText, token: int) -> str:
        if token == unknown:
            raise KeyError(token)
        return spell(self, token)

    monkeypatch.setattr(AnswerText, "push", push)
    # First 9, and then, as 9 is penalised, the token that has no text.
    sampling = Sampling(logit_bias={9: 1000.0, unknown: 900.0}, presence_penalty=500.0)
    async with running(folder_of("llama")) as engine:
        prompt = [9] * 40
        mates = [engine.submit(job_of(prompt, 20, sampling=Sampling(logit_bias={8: 1000.0}))) for _ in range(3)]
        await fails(engine.submit(job_of(prompt, 20, sampling=sampling)), caplog)
        for mate in mates:
            assert (await outcome(mate)).tokens == [8] * 20
        await fails(engine.submit(job_of(prompt, 1, sampling=Sampling(logit_bias={unknown: 1000.0}))), caplog)
        assert engine.stats().in_flight_bytes == 0


async def test_a_join_that_fails_ends_the_batch_it_was_changing(
    folder_of: FolderOf, solo: Solo, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its layers have the new row and half don't: nothing that it says can be trusted."""
    async with running(folder_of("llama")) as engine:
        first = await begun(engine.submit(job_of(prompt_of(40), 3000)))
        with monkeypatch.context() as patch:
            patch.setattr(batch, "_merged", lambda _: [None, None])
            second = engine.submit(job_of(prompt_of(41), 5))
            await fails(second, caplog)
            await fails(first, caplog)
        await still_works(engine, solo)


async def test_many_failures_leave_nothing_behind(engine: Engine, solo: Solo, caplog: pytest.LogCaptureFixture) -> None:
    async def one(number: int) -> Outcome | None:
        prompt = prompt_of(30 + number)
        if number % 3 == 0:
            prompt[number] = POISON
        handle = engine.submit(job_of(prompt, 8))
        if number % 5 == 4:
            handle.cancel()
        try:
            return await outcome(handle)
        except EngineError:
            return None

    got = await asyncio.gather(*(one(number) for number in range(24)))
    assert [each is None for each in got] == [number % 3 == 0 and number % 5 != 4 for number in range(24)]
    assert len({record.getMessage() for record in caplog.records}) == sum(each is None for each in got)
    await still_works(engine, solo)
