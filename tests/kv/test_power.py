"""A power cut at any moment of any operation leaves a state that was acknowledged, or the one that was on its way."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kv.driver import TENANT, Driver
from tests.kv.power import Moment, PowerlessFiles, RecordedDatabase, put_down
from tests.kv.words import LAYOUTS, context
from warmkv_server.kv import startup
from warmkv_server.kv.records import Durability, TokenIds
from warmkv_server.kv.types import KVLayout

State = dict[str, TokenIds | None]


class Story:
    """Operations on a store whose every moment is recorded."""

    def __init__(self, driver: Driver, files: PowerlessFiles) -> None:
        self.driver = driver
        self.files = files
        self.state: State = {}

    async def step(self, agent: str, after: TokenIds | None, work: Awaitable[Any]) -> None:
        """One operation: while it runs the agent may be as before or as after; once acknowledged only as after."""
        self.files.acknowledge([dict(self.state), {**self.state, agent: after}])
        await work
        self.state[agent] = after
        self.files.acknowledge([dict(self.state)])

    async def put(self, agent: str, tokens: TokenIds, keep: list[int] | None = None) -> None:
        await self.step(agent, tokens, self.driver.put(agent, tokens, keep=keep or []))


async def tell(story: Story) -> None:
    store = story.driver.store
    await story.put("a", context(300), keep=[299, 300])
    await story.put("a", context(400))
    await story.put("a", context(700))
    await story.step("b", story.state["a"], store.fork(TENANT, "a", "b"))
    await story.put("b", context(700, [5] * 100))
    await story.put("a", context(600, [9] * 5))
    await store.evict(TENANT, "a")
    await story.put("c", context(520))
    await story.step("b", None, store.delete(TENANT, "b"))
    await store.settled()
    await story.put("b", context([3] * 260))
    await story.step("a", None, store.delete(TENANT, "a"))
    await story.put("c", context(530))


async def judge(folder: Path, layout: KVLayout, moment: Moment) -> None:
    driver = await Driver.open(folder, layout)
    found = {record.agent_id: driver.store.tokens(TENANT, record.agent_id) for record in driver.store.agents(TENANT)}
    assert any(_equal(found, state) for state in moment.allowed), {k: len(v) for k, v in found.items()}  # type: ignore[attr-defined]
    for agent, tokens in found.items():
        reuse = await driver.reuse(agent, tokens)
        assert reuse.length == len(tokens), f"{agent}: {reuse.length} of {len(tokens)} tokens ({reuse.fallback})"
    assert not driver.store.stats().quarantined
    await driver.close()


def _equal(found: dict[str, TokenIds], state: State) -> bool:
    wanted = {agent: tokens for agent, tokens in state.items() if tokens is not None}
    return found.keys() == wanted.keys() and all(np.array_equal(found[a], wanted[a]) for a in found)


@pytest.mark.parametrize("layout", ["append", "everything"])
async def test_a_power_cut_at_any_moment(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    files = PowerlessFiles(data)
    monkeypatch.setattr(RecordedDatabase, "files", files, raising=False)
    monkeypatch.setattr(startup, "Database", RecordedDatabase)
    driver = await Driver.open(data, LAYOUTS[layout], files=files, durability=Durability.FULL)
    files.moments.clear()
    files.acknowledge([{}])
    story = Story(driver, files)
    await tell(story)
    await driver.close()
    monkeypatch.undo()

    rng = random.Random(0)
    moments = list({moment.key(): moment for moment in files.moments}.values())
    tried = 0
    for moment in moments:
        for how in ("nothing", "names", "some"):
            folder = tmp_path / f"cut{tried}"
            await asyncio.to_thread(put_down, moment.image(how, rng), data, folder)
            await judge(folder, LAYOUTS[layout], moment)
            await asyncio.to_thread(shutil.rmtree, folder)
            tried += 1
    print(f"{len(moments)} moments, {tried} power cuts")
    assert len(moments) > 50
