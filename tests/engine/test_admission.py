"""What an engine takes on: within its memory, its batch and its queue, and nothing once it ends."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import mlx.core as mx
import pytest

from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES
from tests.engine.runs import job_of, outcome, outcomes, prompt_of, running
from warmkv_server.contract.fairness import Tenants
from warmkv_server.contract.generation import EngineStats, Finish, Job
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.engine import Engine, Handle
from warmkv_server.engine.steps.schedule import together
from warmkv_server.errors import Draining, MemoryBudget, OperatorError, QueueFull


async def watched(engine: Engine, work: asyncio.Future[None] | asyncio.Task[None]) -> list[EngineStats]:
    """The engine's gauges, read over and over while the work goes on."""
    seen = []
    while not work.done():
        seen.append(engine.stats())
        await asyncio.sleep(0)
    await work
    return seen


def task(engine: Engine, jobs: list[Job]) -> asyncio.Task[None]:
    async def run() -> None:
        for got in await outcomes(engine, jobs):
            assert got.finished.finish is Finish.LENGTH

    return asyncio.create_task(run())


async def test_a_job_that_never_fits_is_refused_at_once(folder_of: FolderOf) -> None:
    async with running(folder_of("llama"), inflight_bytes=2_000_000) as engine:
        with pytest.raises(MemoryBudget, match=r"40 tokens .* up to 2000 need \d+ bytes .* 2000000.*--inflight-bytes"):
            engine.submit(job_of(prompt_of(40), 2000))
        assert (await outcome(engine.submit(job_of(prompt_of(30), 5)))).finished.finish is Finish.LENGTH


async def test_running_jobs_stay_within_the_bytes(folder_of: FolderOf) -> None:
    """Two fit, so six jobs run two at a time."""
    jobs = [job_of(prompt_of(30), 10) for _ in range(6)]
    async with running(folder_of("llama")) as engine:
        two, three = (together([engine.needs.of_job(job) for job in jobs[:count]]) for count in (2, 3))
    budget = (two + three) // 2
    async with running(folder_of("llama"), inflight_bytes=budget) as engine:
        seen = await watched(engine, task(engine, jobs))
    assert max(stats.in_flight_bytes for stats in seen) <= budget
    assert max(stats.prefilling + stats.decoding for stats in seen) == 2


async def test_no_more_run_at_once_than_the_batch(folder_of: FolderOf) -> None:
    async with running(folder_of("llama"), max_batch=3) as engine:
        seen = await watched(engine, task(engine, [job_of(prompt_of(30), 20) for _ in range(7)]))
    assert max(stats.prefilling + stats.decoding for stats in seen) == 3
    assert max(stats.batch_size for stats in seen) == 3
    assert max(stats.queue_depth for stats in seen) >= 4


async def test_a_full_queue_refuses_and_then_takes_again(folder_of: FolderOf) -> None:
    async with running(folder_of("llama"), max_batch=1, max_queue=2) as engine:
        handles = [engine.submit(job_of(prompt_of(200), 5)) for _ in range(3)]
        with pytest.raises(QueueFull) as caught:
            engine.submit(job_of(prompt_of(5), 1))
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 0
        handles[1].cancel()
        await outcome(handles[1])
        handles.append(engine.submit(job_of(prompt_of(5), 1)))
        for handle in handles:
            if handle.phase != "done":
                assert (await outcome(handle)).finished.finish is Finish.LENGTH


async def test_tenants_take_turns(folder_of: FolderOf) -> None:
    """One that has sent many jobs doesn't hold up one that comes later with few."""
    order: list[str] = []

    async def read(name: str, handle: Handle) -> None:
        await outcome(handle)
        order.append(name)

    async with running(folder_of("llama"), max_batch=1) as engine:
        arrivals = ["red"] * 5 + ["blue"] * 2 + ["green"]
        jobs = [replace(job_of(prompt_of(40 + n), 3), tenant=tenant) for n, tenant in enumerate(arrivals)]
        handles = [engine.submit(job) for job in jobs]
        await asyncio.gather(*(read(f"{handle.tenant}{n}", handle) for n, handle in enumerate(handles)))
    assert order == ["red0", "blue5", "green7", "red1", "blue6", "red2", "red3", "red4"]


async def test_a_full_engine_takes_jobs_of_a_tenant_that_has_less_than_its_share(folder_of: FolderOf) -> None:
    async with running(folder_of("llama"), max_batch=1, max_queue=3, tenants=Tenants(2)) as engine:

        def submit(tenant: str) -> Handle:
            return engine.submit(replace(job_of(prompt_of(200), 2), tenant=tenant))

        handles = [submit("red") for _ in range(4)]
        with pytest.raises(QueueFull):
            submit("red")
        handles += [submit("blue") for _ in range(2)]
        for tenant in ("red", "blue"):
            with pytest.raises(QueueFull):
                submit(tenant)
        for handle in handles:
            assert (await outcome(handle)).finished.finish is Finish.LENGTH


def mlx_threads() -> int:
    return sum(thread.name == "mlx" for thread in threading.enumerate())


async def test_stopping_ends_every_job_and_the_thread(folder_of: FolderOf) -> None:
    """Whether it waits, prefills or decodes."""
    async with running(folder_of("gemma3_text"), max_batch=4) as engine:
        handles = [engine.submit(job_of(prompt_of(20 + n), 3000)) for n in range(3)]
        handles += [engine.submit(job_of(prompt_of(3000), 5)) for _ in range(2)]
        async for _ in handles[0]:
            if all(handle.phase == "decoding" for handle in handles[:3]) and handles[3].phase == "prefilling":
                break
        assert handles[4].phase == "queued"
        before = mlx_threads()
        await engine.stop()
        assert mlx_threads() == before - 1
        for handle in handles:
            with pytest.raises(Draining):
                await outcome(handle)


async def test_nothing_is_taken_on_once_stopping_began(folder_of: FolderOf) -> None:
    async with running(folder_of("llama")) as engine:
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            engine.submit(job_of(prompt_of(5), 1))
        await stopping
        with pytest.raises(Draining):
            engine.submit(job_of(prompt_of(5), 1))


async def test_stopping_twice_is_harmless(folder_of: FolderOf) -> None:
    async with running(folder_of("llama")) as engine:
        await asyncio.gather(engine.stop(), engine.stop())


def kept_at_most() -> int:
    """Bytes of freed memory that MLX may keep."""
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


async def test_limits_of_memory_are_as_before_once_it_has_stopped(folder_of: FolderOf) -> None:
    before = kept_at_most()
    for nbytes, expected in ((8_000_000, 2_000_000), (1 << 50, before)):
        async with running(folder_of("llama"), inflight_bytes=nbytes) as engine:
            assert kept_at_most() == expected
            await outcome(engine.submit(job_of(prompt_of(600), 5)))
            assert mx.get_cache_memory() <= expected
        assert kept_at_most() == before
        assert mx.get_cache_memory() == 0
    with pytest.raises(OperatorError):
        await Engine.start(Settings(model="builtin:none", inflight_bytes=8_000_000))
    assert kept_at_most() == before


@pytest.mark.parametrize("spec", ["builtin:none", "random:none", "/nowhere"])
async def test_a_model_that_cannot_be_served_leaves_no_thread(spec: str) -> None:
    before = mlx_threads()
    with pytest.raises(OperatorError):
        await Engine.start(Settings(model=spec))
    assert mlx_threads() == before


async def test_one_engine_after_another(folder_of: FolderOf) -> None:
    """Stopping one takes nothing from the next, nor from one that runs beside it."""
    async with running(folder_of("llama")) as beside:
        for name in ("llama", "qwen3", "mamba2"):
            async with running(folder_of(name), FAMILIES[name].group_size) as engine:
                both = [outcome(each.submit(job_of(prompt_of(40), 5))) for each in (engine, beside)]
                for got in await asyncio.gather(*both):
                    assert got.finished.finish is Finish.LENGTH
