"""What an engine computes, through a real store and back: from RAM, from disk, and after the store was opened anew."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.engine.runs import Outcome, after, outcome
from warmkv_server.contract.generation import Answer, Job
from warmkv_server.contract.kv import Reuse
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.engine import Engine
from warmkv_server.kv.store import Commit, Durability, Fingerprint, Store


@dataclass
class Kept:
    """An engine, and a store of its KV."""

    engine: Engine
    store: Store

    async def save(self, tokens: Sequence[int], job: Job | None = None) -> Outcome:
        """Compute a context and commit it; with a job that answers, prompt and answer."""
        got = await outcome(self.engine.submit(job or Job(tokens)))
        context = np.array([*tokens, *got.finished.completion], np.int32)
        with self.store.resolve("", "agent", context, len(context)) as lease:
            await self.store.commit(
                Commit("", "agent", lease.incarnation, context, Reuse(), got.finished.growth, lease)
            )
        return got

    async def load(self, tokens: Sequence[int]) -> Reuse:
        """The longest prefix that is there."""
        ids = np.array(tokens, np.int32)
        with self.store.resolve("", "agent", ids, len(ids)) as lease:
            return await self.store.load(lease)

    async def go_on(self, tokens: Sequence[int], reuse: Reuse, count: int, vocabulary: int) -> Outcome:
        """Answer behind what was loaded, with all log-probabilities."""
        answer = Answer(max_tokens=count, ignore_eos=True, top_logprobs=vocabulary)
        return await outcome(self.engine.submit(after(tokens, reuse.spans, reuse.length, answer)))


@asynccontextmanager
async def kept(engine: Engine, folder: Path) -> AsyncIterator[Kept]:
    """The store in this folder, as a server with this engine opens it."""
    layout = replace(engine.info.layout, vocabulary=engine.info.vocab_size)
    fingerprint = Fingerprint.of_model(engine.info.fingerprint_fields)
    store = await Store.open(Settings(data_dir=folder, durability=Durability.NONE), layout, fingerprint)
    try:
        yield Kept(engine, store)
    finally:
        await store.close()


async def check_hot_equals_warm(
    engine: Engine, folder: Path, tokens: Sequence[int], new: Sequence[int], vocabulary: int, count: int = 4
) -> Outcome:
    """Fail unless a saved context goes on from RAM, from disk and after a restart alike, bit for bit."""
    context = [*tokens, *new]
    async with kept(engine, folder) as state:
        await state.save(tokens)
        hot = await state.load(tokens)
        assert hot.hot_tokens == hot.length == len(tokens)
        first = await state.go_on(context, hot, count, vocabulary)
        await state.store.evict("", "agent")
        warm = await state.load(tokens)
        assert warm.warm_tokens == warm.length == len(tokens)
        second = await state.go_on(context, warm, count, vocabulary)
    async with kept(engine, folder) as state:
        again = await state.load(tokens)
        assert again.warm_tokens == len(tokens)
        third = await state.go_on(context, again, count, vocabulary)
    assert first.logprobs == second.logprobs == third.logprobs
    assert len(first.logprobs) == count
    return first
