"""Memory runs out in the middle of a step: what runs begins again once, from what it had, or is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from tests.engine.conftest import FolderOf
from tests.engine.runs import (
    CHUNK,
    Outcome,
    Solo,
    after,
    become,
    check_greedy,
    check_growth,
    job_of,
    outcome,
    prompt_of,
    running,
)
from tests.engine.spans import grown, needed
from warmkv_server.contract.generation import Answer, Delta, Finish, Job, Progress, Sampling, Started
from warmkv_server.contract.pressure import MemoryPressure
from warmkv_server.engine.cache.codecs.codec import join
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.steps.running_set import ran_out
from warmkv_server.errors import EngineError, MemoryBudget, WarmKVError

KINDS = ["llama", "deepseek_v3", "gemma3_text", "gemma4_shared_kv", "llama4_chunked", "qwen3_5", "falcon_h1"]

OUT = "[malloc] Unable to allocate 1099511627776 bytes."


@dataclass
class Device:
    """Runs out of memory in the calls of the model for which `wants` says so.

    Half of the layers have the new tokens by then, and half don't: it breaks behind the model's own call, whose arrays
    are then thrown away.
    """

    wants: Callable[[int, int], bool] = lambda _rows, _tokens: False
    calls: list[tuple[int, int]] = field(default_factory=list)
    failed: int = 0

    def limited(self, real: type[Any]) -> type[Any]:
        device = self

        def call(model: Any, inputs: mx.array, *rest: Any, **options: Any) -> Any:
            rows, tokens = inputs.shape
            device.calls.append((rows, tokens))
            logits = real.__call__(model, inputs, *rest, **options)
            if device.wants(rows, tokens):
                device.failed += 1
                raise RuntimeError(OUT)
            return logits

        return type("Limited", (real,), {"__call__": call})

    def fail(self, times: int, of: Callable[[int, int], bool], after_calls: int = 0) -> None:
        """Fail so many of the next calls of a kind, behind some of them that go well."""
        seen = 0

        def wants(rows: int, tokens: int) -> bool:
            nonlocal seen
            if not of(rows, tokens):
                return False
            seen += 1
            return after_calls < seen <= after_calls + times

        self.wants = wants


def decoding(_: int, tokens: int) -> bool:
    return tokens == 1


def prefilling(_: int, tokens: int) -> bool:
    return tokens > 1


@asynccontextmanager
async def scarce(folder: Any, **settings: Any) -> AsyncIterator[tuple[Engine, Device]]:
    device = Device()
    with pytest.MonkeyPatch.context() as patch:
        become(patch, device.limited)
        async with running(folder, **settings) as engine:
            device.calls.clear()
            yield engine, device


def check_events(got: Outcome, prompt: int) -> None:
    """A client notices nothing: it starts once, progress only grows, no token comes twice."""
    assert sum(isinstance(event, Started) for event in got.events) == 1
    progress = [event.done for event in got.events if isinstance(event, Progress)]
    assert progress == sorted(set(progress))
    assert all(done <= prompt for done in progress)
    assert tuple(got.tokens) == got.finished.completion


async def check_idle(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.queue_depth, stats.prefilling, stats.decoding, stats.in_flight_bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", KINDS)
async def test_a_sequence_goes_on_from_what_it_had(name: str, folder_of: FolderOf) -> None:
    """In the middle of its prefill, of its answer (behind words that were gathered), and of the end."""
    solo = Solo(folder_of(name))
    pressure = MemoryPressure()
    async with scarce(folder_of(name), pressure=pressure) as (engine, device):
        relieved = 0

        def relieve() -> None:
            nonlocal relieved
            relieved += 1

        pressure.listen(relieve)
        for kind, good_calls in ((prefilling, 2), (decoding, 0), (decoding, 1), (decoding, 70)):
            device.fail(1, kind, good_calls)
            count = good_calls + 10
            got = await outcome(engine.submit(job_of(prompt_of(100), count)))
            check_events(got, 100)
            assert got.finished.finish is Finish.LENGTH
            check_greedy(got.tokens, solo.answer(prompt_of(100), count))
            check_growth(got.finished.growth, 0, 100 + count)
            held = 100 + count
            spans = needed(grown([got.finished.growth], held), engine.info.layout, held)
            tokens = [*prompt_of(100), *got.tokens, 9, 10]
            more = await outcome(engine.submit(after(tokens, spans, held, Answer(max_tokens=4, ignore_eos=True))))
            check_greedy(more.tokens, solo.answer(tokens, 4))
        assert device.failed == relieved == 4
        await check_idle(engine)


async def test_what_was_computed_is_not_computed_again(folder_of: FolderOf) -> None:
    async with scarce(folder_of("llama")) as (engine, device):
        device.fail(1, prefilling, after_calls=20)
        await outcome(engine.submit(job_of(prompt_of(30 * CHUNK), 3)))
        chunks = sum(tokens == CHUNK for _, tokens in device.calls)
        assert 30 <= chunks <= 31, "only the chunk that failed may be computed twice"


async def test_a_reused_prefix_is_used_again(folder_of: FolderOf) -> None:
    """Also one whose spans reach beyond it."""
    solo = Solo(folder_of("llama"))
    async with scarce(folder_of("llama")) as (engine, device):
        spans = grown([(await outcome(engine.submit(Job(prompt_of(80))))).finished.growth], 80)
        tokens = [*prompt_of(70), *prompt_of(90, seed=4)]
        device.fail(1, prefilling, after_calls=1)
        got = await outcome(engine.submit(after(tokens, spans, 70, Answer(max_tokens=6, ignore_eos=True))))
        check_greedy(got.tokens, solo.answer(tokens, 6))
        check_growth(got.finished.growth, 70, 166)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1"])
async def test_rows_of_a_batch_go_on_one_by_one_and_others_beside_them(name: str, folder_of: FolderOf) -> None:
    solo = Solo(folder_of(name))
    async with scarce(folder_of(name)) as (engine, device):
        device.fail(1, lambda rows, tokens: rows > 2 and tokens == 1, after_calls=3)
        prompts = [prompt_of(length) for length in (40, 41, 42, 400)]
        handles = [engine.submit(job_of(prompt, 40)) for prompt in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            got = await outcome(handle)
            check_events(got, len(prompt))
            check_greedy(got.tokens, solo.answer(prompt, 40))
            check_growth(got.finished.growth, 0, len(prompt) + 40)
        assert device.failed == 1
        await check_idle(engine)


async def test_sampling_goes_on_as_it_would_have(folder_of: FolderOf) -> None:
    """With the same draws, and penalties for the same tokens."""
    samplings = [
        Sampling(temperature=1.5, seed=3),
        Sampling(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5),
    ]
    async with scarce(folder_of("llama"), kv_bits=0) as (engine, device):
        for sampling in samplings:
            job = job_of(prompt_of(40), 30, sampling=sampling, top_logprobs=2)
            expected = await outcome(engine.submit(job))
            device.fail(1, decoding, after_calls=12)
            got = await outcome(engine.submit(job))
            assert got.tokens == expected.tokens
            assert [each.token_id for each in got.logprobs] == got.tokens
            assert got.text == expected.text
        assert device.failed == 2


@pytest.mark.parametrize("kind", [prefilling, decoding])
async def test_what_fails_again_is_refused_and_nothing_else(
    kind: Callable[[int, int], bool], folder_of: FolderOf
) -> None:
    solo = Solo(folder_of("llama"))
    async with scarce(folder_of("llama")) as (engine, device):
        device.fail(2, kind)
        with pytest.raises(MemoryBudget) as caught:
            await outcome(engine.submit(job_of(prompt_of(100), 10)))
        assert caught.value.retry_after is not None
        assert OUT not in str(caught.value)
        second = await outcome(engine.submit(job_of(prompt_of(90), 10)))
        check_greedy(second.tokens, solo.answer(prompt_of(90), 10))
        await check_idle(engine)


async def test_cancelling_one_that_waits_for_its_second_try_keeps_what_has_its_words(folder_of: FolderOf) -> None:
    """It waits behind one that runs: tokens whose words are lost are not kept, those that have them are."""
    pressure, out = MemoryPressure(), asyncio.Event()
    pressure.listen(out.set)
    async with scarce(folder_of("llama"), pressure=pressure) as (engine, device):
        beside = engine.submit(job_of(prompt_of(400), 3000))
        async for event in beside:
            if isinstance(event, Delta):
                break
        device.fail(1, decoding, after_calls=150)
        handle = engine.submit(job_of(prompt_of(40), 3000))
        await out.wait()
        waiting = next(each for each in (handle, beside) if each.phase != "done")
        for each in (handle, beside):
            each.cancel()
        for each, prompt in ((handle, 40), (beside, 400)):
            finished = (await outcome(each)).finished
            assert finished.finish is Finish.CANCELLED
            check_growth(finished.growth, 0, prompt + len(finished.completion))
            assert len(finished.completion) > 50
        assert waiting.phase == "done"
        await check_idle(engine)


async def test_memory_that_runs_out_at_the_very_end(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is there, and gathering its words fails: it is not answered twice."""
    failures = 1

    def scarce_join(*arguments: Any) -> mx.array:
        nonlocal failures
        if failures:
            failures -= 1
            raise RuntimeError(OUT)
        return join(*arguments)

    async with running(folder_of("llama")) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("warmkv_server.engine.steps.sequence.join", scarce_join)
            got = await outcome(engine.submit(job_of(prompt_of(70), 5)))
        assert failures == 0
        check_events(got, 70)
        assert got.finished.finish is Finish.LENGTH
        check_growth(got.finished.growth, 0, 75)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(OUT), True),
        (RuntimeError("[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum"), True),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)"), True),
        (RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[matmul] Last dimension of first input must match"), False),
        (KeyError("memory"), False),
    ],
)
def test_how_devices_say_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert ran_out(error) == expected


async def test_another_failure_on_the_second_try_has_an_id(folder_of: FolderOf) -> None:
    async with scarce(folder_of("llama")) as (engine, device):

        def wants(_rows: int, tokens: int) -> bool:
            if tokens > 1 and device.failed:
                raise ValueError("something else")
            return tokens > 1

        device.wants = wants
        with pytest.raises(WarmKVError) as caught:
            await outcome(engine.submit(job_of(prompt_of(100), 10)))
        assert isinstance(caught.value, EngineError)
        await check_idle(engine)
