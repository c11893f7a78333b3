"""A power cut at any moment of any operation leaves a state that was acknowledged, or the one that was on its way."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kv.driver import TENANT, Driver
from tests.kv.power import Moment, PowerlessFiles, RecordedDatabase, put_down
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.kv import KVLayout
from warmkv_server.contract.store import Durability
from warmkv_server.errors import OperatorError
from warmkv_server.kv.catalog import truth
from warmkv_server.kv.catalog.database import INDEX_FILE
from warmkv_server.kv.index.records import TokenIds

State = dict[str, TokenIds | None]
RAM_DISK = Path("/dev/shm")


@dataclass
class Allowed:
    """
    Attributes:
        states: what the store may be.
        manifests: what it may be if the index is lost too, for each agent: also what it was a moment ago, but nothing
            from before a deletion.
    """

    states: list[State]
    manifests: dict[str, list[TokenIds | None]]


class Story:
    """Operations on a store whose every moment is recorded."""

    def __init__(self, driver: Driver, files: PowerlessFiles) -> None:
        self.driver = driver
        self.files = files
        self.state: State = {}
        self.manifests: dict[str, list[TokenIds | None]] = {agent: [None] for agent in "abc"}

    async def step(self, agent: str, after: TokenIds | None, work: Awaitable[Any]) -> None:
        """One operation: while it runs the agent may be as before or as after; once acknowledged only as after."""
        self.manifests[agent] = [*self.manifests[agent], after]
        self.allow(dict(self.state), {**self.state, agent: after})
        await work
        self.state[agent] = after
        if after is None:
            self.manifests[agent] = [None]
        self.allow(dict(self.state))

    async def settle(self) -> None:
        await self.driver.store.settled()
        self.manifests = {agent: [self.state.get(agent)] for agent in self.manifests}
        self.allow(dict(self.state))

    def allow(self, *states: State) -> None:
        self.files.acknowledge(Allowed(list(states), dict(self.manifests)))

    async def put(self, agent: str, tokens: TokenIds, keep: list[int] | None = None) -> None:
        await self.step(agent, tokens, self.driver.put(agent, tokens, keep=keep or []))


async def tell(story: Story) -> None:
    store = story.driver.store
    await story.put("a", context(300), keep=[299, 300])
    await story.put("a", context(400))
    await story.settle()
    await story.put("a", context(700))
    await story.step("b", story.state["a"], store.fork(TENANT, "a", "b"))
    await story.put("b", context(700, [5] * 100))
    await story.put("a", context(600, [9] * 5))
    await story.settle()
    await store.evict(TENANT, "a")
    await story.put("c", context(520))
    await story.step("b", None, store.delete(TENANT, "b"))
    await story.settle()
    await story.put("b", context([3] * 260))
    await story.step("a", None, store.delete(TENANT, "a"))
    await story.put("c", context(530))
    await story.settle()


async def judge(folder: Path, layout: KVLayout, moment: Moment) -> None:
    driver = await Driver.open(folder, layout)
    found = {record.agent_id: driver.store.tokens(TENANT, record.agent_id) for record in driver.store.agents(TENANT)}
    assert any(_equal(found, state) for state in moment.allowed.states), {k: len(v) for k, v in found.items()}  # type: ignore[attr-defined]
    for agent, tokens in found.items():
        reuse = await driver.reuse(agent, tokens)
        assert reuse.length == len(tokens), f"{agent}: {reuse.length} of {len(tokens)} tokens ({reuse.fallback})"
    assert not driver.store.stats().quarantined
    await driver.close()


async def judge_without_index(folder: Path, layout: KVLayout, moment: Moment) -> None:
    manifests: dict[str, list[TokenIds | None]] = moment.allowed.manifests  # type: ignore[attr-defined]
    try:
        driver = await Driver.open(folder, layout)
    except OperatorError:
        assert all(any(tokens is None for tokens in may_be) for may_be in manifests.values()), "there are no manifests"
        return
    for agent, may_be in manifests.items():
        found = driver.store.tokens(TENANT, agent) if driver.store.agent(TENANT, agent) is not None else None
        assert any(_same(found, tokens) for tokens in may_be), f"{agent}: {None if found is None else len(found)}"
        if found is not None:
            reuse = await driver.reuse(agent, found)
            assert reuse.length == len(found), f"{agent}: {reuse.length} of {len(found)} tokens ({reuse.fallback})"
    await driver.close()


def _same(one: TokenIds | None, other: TokenIds | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _equal(found: dict[str, TokenIds], state: State) -> bool:
    wanted = {agent: tokens for agent, tokens in state.items() if tokens is not None}
    return found.keys() == wanted.keys() and all(np.array_equal(found[a], wanted[a]) for a in found)


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a RAM disk: what would be on a medium after a power cut is simulated, and is laid out hundreds of times."""
    made = tempfile.mkdtemp(prefix="warmkv-power-", dir=RAM_DISK if RAM_DISK.is_dir() else None)
    yield Path(made)
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize("layout", ["append", "everything"])
async def test_a_power_cut_at_any_moment(layout: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder / "data"
    files = PowerlessFiles(data)
    monkeypatch.setattr(RecordedDatabase, "files", files, raising=False)
    monkeypatch.setattr(truth, "Database", RecordedDatabase)
    driver = await Driver.open(data, LAYOUTS[layout], files=files, durability=Durability.FULL)
    files.moments.clear()
    story = Story(driver, files)
    story.allow({})
    await tell(story)
    await driver.close()
    monkeypatch.undo()

    rng = random.Random(0)
    moments = list({moment.key(): moment for moment in files.moments}.values())
    tried = 0
    for moment in moments:
        for how in ("nothing", "names", "some"):
            image = moment.image(how, rng)
            cut = folder / f"cut{tried}"
            await asyncio.to_thread(put_down, image, data, cut)
            await judge(cut, LAYOUTS[layout], moment)
            await asyncio.to_thread(shutil.rmtree, cut)
            tried += 1
            if how == "some":
                without = {path: content for path, content in image.items() if not path.name.startswith(INDEX_FILE)}
                await asyncio.to_thread(put_down, without, data, cut)
                await judge_without_index(cut, LAYOUTS[layout], moment)
                await asyncio.to_thread(shutil.rmtree, cut)
    print(f"{len(moments)} moments, {tried} power cuts")
    assert len(moments) > 50
