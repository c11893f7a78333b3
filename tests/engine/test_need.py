"""What a request is said to need beforehand against what it really takes: never less, and not much more."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES
from tests.engine.runs import after, job_of, outcome, outcomes, prompt_of, running
from tests.engine.spans import grown, needed
from warmkv_server.contract.generation import Answer, Job
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.model.memory_need import MemoryNeed
from warmkv_server.engine.steps.schedule import together

CHUNK = 256
KINDS = ["llama", "gemma3_text", "deepseek_v3", "mamba2", "falcon_h1", "mixtral"]


@pytest.fixture(autouse=True)
def tidied() -> None:
    """What tests before left must not go while the model is measured, or it would seem to take less."""
    gc.collect()


@contextmanager
def within(engine: Engine, jobs: list[Job], factor: float) -> Iterator[None]:
    """Fail unless the block takes at most what the jobs were said to need, and at least a part of it."""
    expected = together([engine.needs.of_job(job) for job in jobs])
    gc.collect()  # what tests before left
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield
    peak = mx.get_peak_memory() - before
    assert peak <= expected <= factor * peak


@pytest.mark.parametrize(("name", "bits"), [*((name, 4) for name in KINDS), ("llama", 0), ("gemma3_text", 8)])
async def test_one_alone(name: str, bits: int, folder_of: FolderOf) -> None:
    job = job_of(prompt_of(3000), 4)
    async with running(folder_of(name), FAMILIES[name].group_size, prefill_chunk=CHUNK, kv_bits=bits) as engine:
        with within(engine, [job], 2.5):
            await outcome(engine.submit(job))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1"])
async def test_one_behind_a_reused_prefix(name: str, folder_of: FolderOf) -> None:
    tokens, held = prompt_of(3000), 2700
    async with running(folder_of(name), FAMILIES[name].group_size, prefill_chunk=CHUNK) as engine:
        growth = (await outcome(engine.submit(Job(tokens[:held])))).finished.growth
        spans = needed(grown([growth], held), engine.info.layout, held)
        job = after(tokens, spans, held, Answer(max_tokens=4, ignore_eos=True))
        with within(engine, [job], 2.5):
            await outcome(engine.submit(job))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
async def test_some_that_share_a_batch(name: str, folder_of: FolderOf) -> None:
    """Prompts of different lengths join one after another, and answers outgrow their buffers together."""
    jobs = [job_of(prompt_of(length), 300 - length // 4) for length in (400, 350, 420, 380, 360)]
    async with running(folder_of(name), FAMILIES[name].group_size, prefill_chunk=CHUNK) as engine:
        with within(engine, jobs, 3):
            await outcomes(engine, jobs)


async def test_a_long_answer_alone(folder_of: FolderOf) -> None:
    """Its cache grows, and its words are gathered, without another chunk."""
    job = job_of(prompt_of(700), 600)
    async with running(folder_of("llama"), prefill_chunk=CHUNK) as engine:
        with within(engine, [job], 3.5):
            await outcome(engine.submit(job))


def test_steps_come_one_after_another_and_all_else_adds_up() -> None:
    one, other = MemoryNeed(held=300, copied=10, step=50), MemoryNeed(held=600, copied=30, step=20)
    assert together([]) == 0
    assert together([one]) == 350
    assert together([one, other]) == (300 + 600) * 4 // 3 + (10 + 30) * 4 // 3
    assert together([one, other, MemoryNeed(held=0, copied=0, step=100)]) == (300 + 600) * 4 // 3 + 100


async def test_the_shortest_context_limit_is_measured(folder_of: FolderOf) -> None:
    async with running(folder_of("llama"), context_limit=2) as engine:
        assert (await outcome(engine.submit(job_of([9], 1)))).tokens
