"""Whether a large commit holds up another agent's tokens."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from warmkv_evaluation.store_contexts import TENANT, noise, opened, tokens_of
from warmkv_evaluation.store_shapes import Shape
from warmkv_server.contract.generation import Answer, Delta, Finished, Job
from warmkv_server.contract.kv import Growth, Reuse
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.engine import Engine
from warmkv_server.kv.store import Commit, Store

PROMPT_TOKENS = 256
ALONE_TOKENS = 256
ANSWER_TOKENS = 4096


@dataclass(frozen=True)
class Save:
    """Gaps between the tokens of one agent, in seconds: alone, and while another's whole context was committed.

    Attributes:
        shape: of what is saved; the model that decodes is `model`.
        commit_seconds: of each save.
    """

    model: str
    shape: str
    tokens: int
    nbytes: int
    alone: tuple[float, ...]
    saving: tuple[float, ...]
    commit_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """99th percentile of the gaps while saving by that alone."""
        return float(np.percentile(self.saving, 99) / np.percentile(self.alone, 99))


async def measure(model: str, shape: Shape, data_dir: Path, *, tokens: int, rounds: int) -> Save:
    """Every round decodes a while alone, and goes on decoding while `tokens` tokens' KV is committed."""
    layout = shape.cache_map.layout
    growth = noise(layout, 0, tokens, np.random.default_rng(0))
    alone: list[float] = []
    saving: list[float] = []
    seconds: list[float] = []
    engine = await Engine.start(Settings(model=model))
    try:
        async with opened(data_dir, layout, busy=lambda: engine.decoding) as store:
            for number in range(-1, rounds):
                before, during, taken = await _round(engine, store, growth, number)
                if number >= 0:  # the first round warms up
                    alone += before
                    saving += during
                    seconds.append(taken)
    finally:
        await engine.stop()
    nbytes = sum(int(array.nbytes) for family in growth.tensors.values() for array in family.values())
    return Save(model, shape.name, tokens, nbytes, tuple(alone), tuple(saving), tuple(seconds))


async def _round(engine: Engine, store: Store, growth: Growth, number: int) -> tuple[list[float], list[float], float]:
    prompt = [int(token) % 2700 + 300 for token in tokens_of(PROMPT_TOKENS)]
    handle = engine.submit(Job(prompt, answer=Answer(max_tokens=ANSWER_TOKENS, ignore_eos=True)))
    times: list[float] = []
    alone_enough = asyncio.Event()

    async def watch() -> None:
        async for event in handle:
            if isinstance(event, Delta):
                times.append(time.perf_counter())
                if len(times) > ALONE_TOKENS:
                    alone_enough.set()
            elif isinstance(event, Finished):
                alone_enough.set()

    watching = asyncio.create_task(watch())
    await alone_enough.wait()
    context = tokens_of(growth.count, seed=3 + number)
    agent_id = f"saved.{number}"
    began = time.perf_counter()
    with store.resolve(TENANT, agent_id, context, len(context)) as lease:
        committed = await store.commit(Commit(TENANT, agent_id, None, context, Reuse(), growth, lease))
    ended = time.perf_counter()
    handle.cancel()
    await watching
    await store.delete(TENANT, agent_id)
    await store.settled()
    gaps = [(later, later - earlier) for earlier, later in pairwise(times)]
    alone = [gap for at, gap in gaps if at <= began]
    during = [gap for at, gap in gaps if at > began and at - gap < ended]
    return alone, during, committed.seconds
