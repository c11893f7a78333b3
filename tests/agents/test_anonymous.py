"""Requests without an agent whose contexts are kept, under a whole server but its sockets."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.kv.disk import RefusingFiles
from tests.kv.driver import eventually
from warmkv_server.agents.agents import Agents
from warmkv_server.agents.types import GenerateFinished, GenerateRequest
from warmkv_server.contract.content import TokenContent
from warmkv_server.contract.generation import Answer
from warmkv_server.contract.kv import Source
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.engine import Engine
from warmkv_server.kv.store import Fingerprint, Store, Tuning
from warmkv_server.service.response_codecs import response_codecs

TOKENS = [400 + n % 97 for n in range(300)]


@asynccontextmanager
async def keeping(data_dir: Path, files: RefusingFiles) -> AsyncIterator[tuple[Agents, Store]]:
    settings = Settings(data_dir=data_dir, headroom_bytes=0, keep_anonymous=3600.0)
    engine = await Engine.start(settings)
    try:
        fingerprint = Fingerprint.of_model(engine.info.fingerprint_fields)
        tuning = Tuning(retry_seconds=3600.0)
        store = await Store.open(settings, engine.info.layout, fingerprint, tuning=tuning, files=files)
        try:
            yield Agents(engine, store, settings, response_codecs()), store
        finally:
            await store.close()
    finally:
        await engine.stop()


async def ask(agents: Agents, tenant: str = "", tokens: list[int] = TOKENS) -> GenerateFinished:
    answer = Answer(max_tokens=2, ignore_eos=True)
    run = await agents.generate(GenerateRequest(AgentKey(tenant, ""), TokenContent(tuple(tokens)), answer))
    finished = await run.result()
    assert isinstance(finished, GenerateFinished)
    return finished


async def test_where_the_disk_refuses_the_answer_is_the_same_and_nothing_is_owed(tmp_path: Path) -> None:
    files = RefusingFiles()
    async with keeping(tmp_path, files) as (agents, store):
        files.refusal = errno.ENOSPC
        for _ in range(2):
            finished = await ask(agents)
            assert (finished.cache.source, finished.completion_tokens, finished.persisted) == (Source.COLD, 2, False)
        await store.settled()
        assert store.owed() == []
        assert store.stats().hidden_agents == 0
        assert store.stats().hot_bytes == 0
        files.refusal = None
        await ask(agents)
        assert (await ask(agents)).cache.source is Source.HOT


async def test_tenants_have_theirs_apart_and_the_tally_says_what_was_reused(tmp_path: Path) -> None:
    async with keeping(tmp_path, RefusingFiles()) as (agents, store):
        await ask(agents, "red")
        assert (await ask(agents, "blue")).cache.source is Source.COLD
        assert (await ask(agents, "red", [*TOKENS, 500, 501])).cache.hot_tokens == len(TOKENS)
        assert agents.tallies.of("red").anonymous_tokens == len(TOKENS)
        assert agents.tallies.of("blue").anonymous_tokens == 0
        await eventually(lambda: store.stats().hidden_agents == 3)
        assert agents.page("red", "", 10, lambda _: True).agents == ()
