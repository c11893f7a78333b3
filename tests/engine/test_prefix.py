"""KV that is computed once and goes into several jobs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.engine.conftest import FolderOf
from tests.engine.runs import check_growth, job_of, outcome, prompt_of, running
from warmkv_server.contract.generation import Job


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "qwen3_5", "mamba2", "falcon_h1"])
async def test_jobs_with_a_prefix_answer_as_alone_and_grow_all_of_it(folder_of: FolderOf, family: str) -> None:
    """Also where it is windowed or recurrent, and can't be cut."""
    prompt = prompt_of(90)
    async with running(folder_of(family)) as engine:
        alone = await outcome(engine.submit(job_of(prompt, 12)))
        before = engine.stats().prefilled_tokens
        growth = (await outcome(engine.submit(Job(prompt[:-1])))).finished.growth
        several = [replace(job_of(prompt, 12), prefix=growth) for _ in range(3)]
        found = await asyncio.gather(*(outcome(engine.submit(job)) for job in several))
        assert engine.stats().prefilled_tokens - before <= len(prompt) + 3
        for each in found:
            assert each.tokens == alone.tokens
            check_growth(each.finished.growth, 0, len(prompt) + 12)
