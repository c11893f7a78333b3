"""Budgets, pins and lifetimes."""

from __future__ import annotations

from pathlib import Path

from tests.kv.driver import TENANT, Driver, eventually
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.kv import PartKind
from warmkv_server.contract.store import Tier


def disk_use(data_dir: Path) -> int:
    return sum(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())


def count(data_dir: Path, kind: PartKind) -> int:
    """Files of a kind."""
    return len(list(data_dir.glob(f"blocks/*/*.{kind}.*.safetensors")))


async def test_the_hot_tier_keeps_its_budget_and_what_is_pinned(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, hot_bytes=300_000)
    await driver.put("pinned", context([100] * 500), pinned=True)
    for number in range(8):
        await driver.put(str(number), context([number] * 500))
        assert driver.store.stats().hot_bytes <= 300_000
    tiers = {a.agent_id: a.tier for a in driver.store.agents(TENANT)}
    assert tiers["pinned"] is Tier.HOT
    assert tiers["7"] is Tier.HOT
    assert tiers["0"] is Tier.WARM
    assert driver.store.stats().evictions > 0
    # The end of a context leaves first.
    reuse = await driver.reuse("6", context([6] * 500))
    assert reuse.length == 500
    await driver.close()


async def test_pins_keep_within_the_budget_and_their_files(tmp_path: Path) -> None:
    budget = 600_000
    driver = await Driver.open(tmp_path, hot_bytes=budget)
    for number in range(20):
        await driver.put(str(number), context([number] * 500), pinned=True)
        assert driver.store.stats().hot_bytes <= budget
    await driver.put("unpinned", context([100] * 500))
    assert driver.store.stats().hot_bytes <= budget
    tiers = {record.agent_id: record.tier for record in driver.store.agents(TENANT)}
    assert tiers["19"] is Tier.HOT
    assert tiers["0"] is tiers["unpinned"] is Tier.WARM  # what is pinned goes last, the least recently used of it first
    reuse = await driver.reuse("0", context([0] * 500))
    assert (reuse.length, reuse.fallback) == (500, None)
    assert driver.store.stats().hot_bytes <= budget
    await driver.close()


async def test_the_quota_takes_the_oldest_blocks_from_their_ends(tmp_path: Path) -> None:
    limit = 3_000_000
    driver = await Driver.open(tmp_path, disk_bytes=limit, hot_bytes=0)
    await driver.put("pinned", context([100] * 600), pinned=True)
    for number in range(24):
        _, committed = await driver.put(str(number), context([number] * 1000))
        assert committed.persisted
        await driver.store.settled()
        assert disk_use(tmp_path) <= limit
        assert driver.store.stats().disk_bytes >= disk_use(tmp_path)
    assert (await driver.reuse("pinned", context([100] * 600))).length == 600
    lengths = [(await driver.reuse(str(n), context([n] * 1000))).length for n in range(24)]
    assert lengths[-1] == 1000
    assert lengths[0] == 0
    assert sorted(lengths) == lengths
    partly = [length for length in lengths if 0 < length < 1000]
    assert all(length % 256 == 0 for length in partly)
    # What was taken is computed anew, and written again.
    reuse, committed = await driver.put("0", context([0] * 1000))
    assert reuse.length == 0
    assert committed.persisted
    assert (await driver.reuse("0", context([0] * 1000))).length == 1000
    await driver.close()
    driver = await Driver.open(tmp_path, disk_bytes=limit)
    assert (await driver.reuse("0", context([0] * 1000))).length == 1000
    await driver.close()


async def test_a_context_larger_than_the_quota_stays_in_ram(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, disk_bytes=1_700_000)
    _, committed = await driver.put("a", context(2000))
    assert not committed.persisted
    assert (await driver.reuse("a", context(2000))).hot_tokens == 2000
    assert disk_use(tmp_path) <= 1_700_000
    await driver.close()


async def test_an_agent_goes_when_its_time_is_up(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    _, committed = await driver.put("short", context(300), ttl=0.3)
    assert committed.agent.expire_time is not None
    assert abs(committed.agent.expire_time - committed.agent.last_used_time - 0.3) < 1e-6
    await driver.put("long", context(300), ttl=1000.0)
    await eventually(lambda: driver.store.agent(TENANT, "short") is None)
    assert driver.store.agent(TENANT, "long") is not None
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert [a.agent_id for a in driver.store.agents(TENANT)] == ["long"]
    await driver.close()


async def test_windows_and_snapshots_are_kept_at_few_lengths(tmp_path: Path) -> None:
    """However long an agent lives, windowed layers cost a bounded number of windows and snapshots."""
    driver = await Driver.open(tmp_path, LAYOUTS["everything"])
    tokens = context(10)
    for turn in range(40):
        tokens = context(tokens.tolist(), [turn] * 200)
        await driver.put("a", tokens, keep=[len(tokens)])
    await driver.store.settled()
    assert count(tmp_path, PartKind.STATE) <= 6
    assert count(tmp_path, PartKind.WINDOW) <= 12
    assert count(tmp_path, PartKind.APPEND) >= 31
    await driver.close()


async def test_a_restart_knows_who_was_used_last_even_if_nothing_was_committed(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    for name in ("a", "b"):
        await driver.put(name, context([ord(name)] * 300))
    await driver.reuse("a", context([ord("a")] * 300))
    before = {agent.agent_id: agent.last_used_time for agent in driver.store.agents(TENANT)}
    assert before["a"] > before["b"]
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert {agent.agent_id: agent.last_used_time for agent in driver.store.agents(TENANT)} == before
    await driver.close()


async def test_bad_files_leave_most_of_the_quota_to_good_ones(tmp_path: Path) -> None:
    limit = 3_000_000
    driver = await Driver.open(tmp_path, disk_bytes=limit)
    for number in range(4):
        tokens = context([number] * 1000)
        await driver.put("a", tokens)
        await driver.store.evict(TENANT, "a")
        damage_all(tmp_path)
        assert (await driver.reuse("a", tokens)).length == 0
    kept = sum(path.stat().st_size for path in (tmp_path / "quarantine").iterdir())
    assert 0 < kept <= limit // 8
    await driver.close()


def damage_all(data_dir: Path) -> None:
    """Flip a bit of every block."""
    for path in data_dir.glob("blocks/*/*.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
