"""What the rest of the server relies on, on real files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from tests.kv.driver import OTHER_MODEL, TENANT, Driver
from tests.kv.words import LAYOUTS, context, grow
from warmkv_server.contract.kv import Fallback, KVLayout, PartKind, Source
from warmkv_server.contract.store import Tier
from warmkv_server.errors import AgentDeleted, AgentExists, AgentNotFound, OperatorError
from warmkv_server.kv.store import Commit


def block_names(data_dir: Path) -> list[str]:
    return sorted(path.name for path in data_dir.glob("blocks/*/*"))


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> KVLayout:
    return LAYOUTS[request.param]


@pytest.fixture
async def driver(tmp_path: Path, layout: KVLayout) -> AsyncIterator[Driver]:
    driver = await Driver.open(tmp_path, layout)
    yield driver
    await driver.close()


async def test_an_agent_is_cold_then_hot_then_warm_then_warm_after_a_restart(tmp_path: Path, layout: KVLayout) -> None:
    driver = await Driver.open(tmp_path, layout)
    tokens = context(1000)
    reuse, committed = await driver.put("a", tokens)
    assert reuse.source is Source.COLD
    assert committed.persisted
    assert committed.agent.tier is Tier.HOT
    assert (committed.agent.revision, committed.agent.token_count) == (1, 1000)

    longer = context(1000, [7] * 32)
    reuse = await driver.reuse("a", longer)
    assert (reuse.source, reuse.length, reuse.hot_tokens, reuse.bytes_loaded) == (Source.HOT, 1000, 1000, 0)

    evicted = await driver.store.evict(TENANT, "a", drop_page_cache=True)
    assert evicted.bytes_freed > 0
    assert evicted.agent.tier is Tier.WARM
    reuse = await driver.reuse("a", longer)
    assert (reuse.source, reuse.length, reuse.warm_tokens) == (Source.WARM, 1000, 1000)
    assert reuse.bytes_loaded > 0

    before = driver.store.agent(TENANT, "a")
    await driver.close()
    driver = await Driver.open(tmp_path, layout)
    after = driver.store.agent(TENANT, "a")
    assert before is not None
    assert after is not None
    assert (after.revision, after.token_count, after.incarnation) == (1, 1000, before.incarnation)
    reuse = await driver.reuse("a", longer)
    assert (reuse.source, reuse.length) == (Source.WARM, 1000)
    await driver.close()


async def test_growing_by_turns_keeps_every_word(driver: Driver) -> None:
    tokens = context(10)
    rng = np.random.default_rng(1)
    await driver.put("a", tokens)
    for turn in range(25):
        tokens = context(tokens.tolist(), rng.integers(0, 9, rng.integers(1, 150)).tolist())
        reuse, committed = await driver.put("a", tokens, answer=True)
        assert reuse.length > 0
        assert committed.agent.revision == turn + 2
        if turn % 3 == 0:
            await driver.store.evict(TENANT, "a")
    reuse = await driver.reuse("a", tokens)
    assert reuse.length == len(tokens)


async def test_the_same_tokens_again_change_nothing(driver: Driver) -> None:
    tokens = context(700)
    await driver.put("a", tokens)
    written = driver.store.stats().kv_bytes_written
    reuse, committed = await driver.put("a", tokens)
    assert reuse.length == 700
    assert committed.agent.revision == 1
    assert driver.store.stats().kv_bytes_written == written


async def test_a_cut_reuses_what_can_be_cut(driver: Driver, layout: KVLayout) -> None:
    await driver.put("a", context(900))
    reuse, _ = await driver.put("a", context(600, [5] * 10))
    if layout.has_state:
        assert reuse.fallback is Fallback.NOT_TRIMMABLE
    else:
        assert reuse.length == (600 if not layout.window else reuse.length)
    await driver.store.evict(TENANT, "a")
    again = await driver.reuse("a", context(600, [5] * 10))
    assert again.length == 610


async def test_kept_boundaries_serve_a_cut(driver: Driver) -> None:
    tokens = context(1000)
    await driver.put("a", tokens, keep=[999, 1000])
    await driver.put("a", context(1000, [1] * 300))
    await driver.put("a", context(1000, [1] * 900))
    await driver.store.evict(TENANT, "a")
    assert (await driver.reuse("a", tokens, limit=999)).length == 999
    assert (await driver.reuse("a", tokens)).length == 1000
    assert (await driver.reuse("a", context(1000, [2] * 50))).length == 1000


async def test_agents_of_a_tenant_share_and_others_do_not(driver: Driver) -> None:
    tokens = context(800)
    await driver.put("a", tokens)
    written = driver.store.stats().kv_bytes_written
    reuse, committed = await driver.put("b", tokens)
    assert (reuse.source, reuse.shared_tokens) == (Source.SHARED, 800)
    assert committed.agent.shared_bytes == committed.agent.warm_bytes > 0
    assert driver.store.stats().kv_bytes_written == written
    stranger = Driver(driver.store, driver.layout, tenant="other")
    assert (await stranger.reuse("a", tokens)).length == 0


async def test_a_deleted_agent_is_gone_with_its_blocks(tmp_path: Path, layout: KVLayout) -> None:
    driver = await Driver.open(tmp_path, layout)
    tokens = context(800)
    await driver.put("a", tokens)
    assert await driver.store.delete(TENANT, "a")
    assert not await driver.store.delete(TENANT, "a")
    assert driver.store.agent(TENANT, "a") is None
    with pytest.raises(AgentNotFound):
        driver.store.tokens(TENANT, "a")
    assert (await driver.reuse("b", tokens)).length == 0
    await driver.close()
    assert not block_names(tmp_path)
    driver = await Driver.open(tmp_path, layout)
    assert driver.store.agent(TENANT, "a") is None
    await driver.close()


async def test_a_commit_begun_before_the_delete_does_not_bring_the_agent_back(driver: Driver) -> None:
    await driver.put("a", context(300))
    tokens = context(400)
    lease = driver.store.resolve(TENANT, "a", tokens, 400)
    reuse = await driver.store.load(lease)
    await driver.store.delete(TENANT, "a")
    growth = grow(driver.layout, tokens, reuse.length)
    with pytest.raises(AgentDeleted):
        await driver.store.commit(Commit(TENANT, "a", lease.incarnation, tokens, reuse, growth, lease))
    lease.release()
    assert driver.store.agent(TENANT, "a") is None


async def test_a_fork_copies_no_kv_and_outlives_its_source(driver: Driver) -> None:
    tokens = context(800)
    await driver.put("a", tokens)
    written = driver.store.stats().kv_bytes_written
    fork = await driver.store.fork(TENANT, "a", "b")
    assert (fork.revision, fork.token_count, fork.parent_agent_id) == (1, 800, "a")
    assert driver.store.stats().kv_bytes_written == written
    assert (await driver.reuse("b", tokens)).hot_tokens == 800
    with pytest.raises(AgentExists):
        await driver.store.fork(TENANT, "a", "b")
    with pytest.raises(AgentNotFound):
        await driver.store.fork(TENANT, "nobody", "c")
    await driver.put("a", context(800, [3] * 500))
    await driver.store.delete(TENANT, "a")
    await driver.store.evict(TENANT, "b")
    assert (await driver.reuse("b", tokens)).warm_tokens == 800


async def test_a_second_store_is_told_who_has_the_directory(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    with pytest.raises(OperatorError, match="in use by process"):
        await Driver.open(tmp_path)
    await driver.close()


async def test_another_model_misses_and_says_so(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(500))
    await driver.close()
    driver = await Driver.open(tmp_path, fingerprint=OTHER_MODEL)
    record = driver.store.agent(TENANT, "a")
    assert record is not None
    assert not record.fingerprint_ok
    reuse = await driver.reuse("a", context(500))
    assert (reuse.length, reuse.fallback) == (0, Fallback.FINGERPRINT)
    assert await driver.store.delete(TENANT, "a")
    await driver.close()


async def test_a_tenants_agents_are_listed_in_order(driver: Driver) -> None:
    for name in ("b", "a", "c"):
        await driver.put(name, context(5))
    assert [a.agent_id for a in driver.store.agents(TENANT)] == ["a", "b", "c"]
    assert [a.agent_id for a in driver.store.agents(TENANT, "a")] == ["b", "c"]
    assert not list(driver.store.agents("nobody"))


async def test_a_copy_of_a_block_in_another_folder_is_left_alone_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(300))
    await driver.close()
    for name in block_names(tmp_path):
        folder = "00" if not name.startswith("00") else "01"
        (tmp_path / "blocks" / folder / name).write_bytes((tmp_path / "blocks" / name[:2] / name).read_bytes())
    driver = await Driver.open(tmp_path)
    assert (await driver.reuse("a", context(300))).length == 300
    await driver.close()
    assert len(block_names(tmp_path)) == 4
    (said,) = [record.getMessage() for record in caplog.records if "left alone" in record.getMessage()]
    assert said.count(".append.") == 2


async def test_a_file_of_a_kind_that_nobody_knows_is_left_alone_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A newer server, or one with another model, may know it."""
    await (await Driver.open(tmp_path)).close()
    name = f"{'0' * 32}.unheardof.{'1' * 32}.safetensors"
    (tmp_path / "blocks" / "00" / name).write_bytes(b"whatever")
    await (await Driver.open(tmp_path)).close()
    assert block_names(tmp_path) == [name]
    (said,) = [record.getMessage() for record in caplog.records if "left alone" in record.getMessage()]
    assert name in said


async def test_a_window_that_a_deleted_agent_left_goes_with_its_row_written(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, LAYOUTS["small_window"])
    await driver.put("b", context(356))
    shared = driver.put("a", context(256))  # needs a window where b keeps none
    await asyncio.gather(shared, driver.store.delete(TENANT, "a"), return_exceptions=True)
    await driver.store.delete(TENANT, "a")
    await driver.store.settled()
    nodes = list(driver.store.core.index.nodes.values())
    assert [set(node.parts) for node in nodes] == [{PartKind.APPEND}, {PartKind.APPEND, PartKind.WINDOW}]
    assert not any(node.dirty for node in nodes)
    await driver.close()
