"""A bug deep in the store, under a whole server but its sockets: the request that meets it gets an internal error with
an id that the log has too, everybody else their answers, and nothing that was acknowledged is lost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from warmkv_server.agents.agents import Agents
from warmkv_server.agents.types import GenerateFinished, GenerateRequest, PrimeRequest, PrimeResult
from warmkv_server.contract.content import TokenContent
from warmkv_server.contract.generation import Answer
from warmkv_server.contract.kv import Source
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.engine import Engine
from warmkv_server.errors import EngineError
from warmkv_server.kv.blocks import reader
from warmkv_server.kv.store import Fingerprint, Store, Tuning
from warmkv_server.kv.tasks import loader
from warmkv_server.service.response_codecs import response_codecs

TOKENS = {name: [seed + n % 97 for n in range(600)] for name, seed in (("a", 400), ("b", 900))}


class Bug(Exception):
    """What no code expects."""


@asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[tuple[Agents, Store]]:
    settings = Settings(data_dir=data_dir, headroom_bytes=0)
    engine = await Engine.start(settings)
    try:
        fingerprint = Fingerprint.of_model(engine.info.fingerprint_fields)
        store = await Store.open(settings, engine.info.layout, fingerprint, tuning=Tuning(retry_seconds=0.05))
        try:
            yield Agents(engine, store, settings, response_codecs()), store
        finally:
            await store.close()
    finally:
        await engine.stop()


def key(agent: str) -> AgentKey:
    return AgentKey("", agent)


async def prime(agents: Agents, agent: str) -> int:
    result = await agents.prime(PrimeRequest(key(agent), TokenContent(tuple(TOKENS[agent[0]]))))
    assert isinstance(result, PrimeResult)
    return result.cache.prefilled_tokens


async def answer(agents: Agents, agent: str, content: tuple[int, ...] = (500, 501)) -> GenerateFinished:
    request = GenerateRequest(key(agent), TokenContent(content), Answer(max_tokens=3, ignore_eos=True))
    finished = await (await agents.generate(request)).result()
    assert isinstance(finished, GenerateFinished)
    return finished


def internal(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(error, EngineError)
    assert "Bug" not in str(error), "what broke is for the log alone"
    records = [record for record in caplog.records if error.error_id in record.getMessage()]
    assert [record.levelno for record in records] == [logging.ERROR]
    assert records[0].exc_info is not None


def once(real: Callable[..., Any], concerned: Callable[..., bool]) -> Callable[..., Any]:
    """Raises instead, the first time that it is concerned."""
    whole = threading.Semaphore(1)  # taken once, whichever of several threads comes first

    def call(*arguments: Any) -> Any:
        if concerned(*arguments) and whole.acquire(blocking=False):
            raise Bug
        return real(*arguments)

    return call


async def test_bugs_in_load_and_commit_end_the_requests_that_meet_them_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as (agents, store):
        for agent in ("a", "a2", "b"):
            await prime(agents, agent)

        # A file that can't be written, in a way that isn't the disk's.
        files = store.core.files
        before = store.tokens("", "a").tolist()
        write = files.write
        monkeypatch.setattr(files, "write", once(write, lambda path, _: "blocks" in path.parts))
        results = await asyncio.gather(*(answer(agents, agent) for agent in "ab"), return_exceptions=True)
        failed = [(agent, each) for agent, each in zip("ab", results, strict=True) if isinstance(each, BaseException)]
        ((loser, error),) = failed
        internal(error, caplog)
        kept = {agent: store.tokens("", agent).tolist() for agent in ("a", "a2", "b")}
        assert len(kept[loser]) == 600
        assert len(kept["ab".replace(loser, "")]) == 605
        assert (await answer(agents, loser)).persisted

        # A read that breaks, for whoever waits for it.
        for agent in ("a", "a2", "b"):
            await store.evict("", agent)
        first = store.tokens("", "b")[:256].tobytes()
        concerned = once(
            reader.read_parts, lambda _, orders, __: any(each.info.block_tokens == first for each in orders)
        )
        monkeypatch.setattr(loader, "read_parts", concerned)
        good, bad = await asyncio.gather(answer(agents, "a2"), answer(agents, "b"), return_exceptions=True)
        assert not isinstance(good, BaseException)
        assert good.cache.source is Source.WARM
        assert isinstance(bad, BaseException)
        internal(bad, caplog)
        again = await answer(agents, "b")
        assert (again.cache.cached_tokens, again.cache.source, again.persisted) == (605, Source.WARM, True)
        assert before == TOKENS["a"]
        contexts = {agent: store.tokens("", agent).tolist() for agent in ("a", "a2", "b")}
    async with running(tmp_path) as (agents, store):
        for agent, tokens in contexts.items():
            assert store.tokens("", agent).tolist() == tokens
            assert (await answer(agents, agent)).cache.cached_tokens >= len(
                tokens
            )  # more if others have the same tokens behind
