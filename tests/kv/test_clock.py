"""Time that only moves forward, on machines whose clock is set back and forth."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kv.driver import TENANT, Driver, eventually
from tests.kv.words import context
from warmkv_server.kv.catalog.clock import LATEST, Clock, TimeSource
from warmkv_server.kv.catalog.database import INDEX_FILE
from warmkv_server.kv.catalog.readonly import ReadOnlyDatabase
from warmkv_server.kv.index.records import RequestOutcome

HOUR, DAY, YEAR = 3600.0, 86400.0, 365 * 86400.0
REQUEST = RequestOutcome("r", b"body", b"answer")


@dataclass
class Machine:
    """A machine with clocks that go only when a test says so."""

    wall: float = 1.8e9
    elapsed: float = 1000.0
    boot: str = "first"

    @property
    def times(self) -> TimeSource:
        return TimeSource(lambda: self.wall, lambda: self.elapsed, lambda: self.boot)

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.elapsed += seconds

    def reboot(self) -> None:
        self.boot, self.elapsed = f"not {self.boot}", 1.0


def names(driver: Driver) -> list[str]:
    return [agent.agent_id for agent in driver.store.agents(TENANT)]


async def remember(driver: Driver) -> None:
    await driver.put("a", context(10), request=REQUEST)


async def is_remembered(driver: Driver) -> bool:
    """Also after the store has looked for what is too old."""
    await driver.put("b", context(10), ttl=0.001)
    return await driver.store.outcome(TENANT, "r") is not None


@pytest.mark.parametrize("shift", [2 * HOUR, 10 * YEAR, -DAY])
@pytest.mark.parametrize("rebooted", [False, True])
async def test_a_request_id_is_kept_whatever_the_clock_is_set_to(tmp_path: Path, shift: float, rebooted: bool) -> None:
    machine = Machine()
    driver = await Driver.open(tmp_path, times=machine.times)
    await remember(driver)
    machine.wall += shift
    assert await is_remembered(driver)
    await driver.close()
    machine.wall += shift
    if rebooted:
        machine.reboot()
    driver = await Driver.open(tmp_path, times=machine.times)
    assert await is_remembered(driver)
    machine.pass_time(59 * 60)
    assert await is_remembered(driver)
    machine.pass_time(2 * 60)
    await driver.put("c", context(10))
    await eventually(lambda: not driver.store.stats().outcome_bytes)
    await driver.close()
    driver = await Driver.open(tmp_path, times=machine.times)
    assert not await is_remembered(driver)
    await driver.close()


@pytest.mark.parametrize("shift", [-10 * YEAR, -DAY, DAY])
@pytest.mark.parametrize("rebooted", [False, True])
async def test_a_lifetime_ends_whatever_the_clock_is_set_to(tmp_path: Path, shift: float, rebooted: bool) -> None:
    machine = Machine()
    driver = await Driver.open(tmp_path, times=machine.times)
    machine.wall += shift
    await driver.put("a", context(10), ttl=20.0)
    if rebooted:
        await driver.close()
        machine.wall += min(shift, 0)
        machine.reboot()
        driver = await Driver.open(tmp_path, times=machine.times)
    machine.pass_time(19)
    await driver.put("b", context(10))
    await driver.store.settled()
    assert names(driver) == ["a", "b"]
    machine.pass_time(2)
    await driver.put("b", context(11))
    await eventually(lambda: names(driver) == ["b"])
    await driver.close()


async def test_time_without_a_server_counts_for_lifetimes(tmp_path: Path) -> None:
    """By the time since boot if there was no other boot, whatever the clock says; else by the clock."""
    machine = Machine()
    driver = await Driver.open(tmp_path, times=machine.times)
    await driver.put("minutes", context(10), ttl=600.0)
    await driver.put("hours", context(10), ttl=2 * HOUR)
    await driver.close()
    machine.wall += 30 * DAY
    machine.elapsed += HOUR
    driver = await Driver.open(tmp_path, times=machine.times)
    await eventually(lambda: names(driver) == ["hours"])
    await driver.close()
    machine.wall += 2 * HOUR
    machine.reboot()
    driver = await Driver.open(tmp_path, times=machine.times)
    await eventually(lambda: names(driver) == [])
    await driver.close()


async def test_a_killed_server_has_used_its_time(tmp_path: Path) -> None:
    """What wasn't written down of it follows from the agents' last use, or from the clock."""
    machine = Machine()
    driver = await Driver.open(tmp_path, times=machine.times)
    machine.pass_time(HOUR)
    await driver.put("a", context(10))
    with ReadOnlyDatabase(tmp_path / INDEX_FILE) as database:
        (kept,) = database.query("SELECT time, wall, elapsed, boot, shift, away FROM clock")
    await driver.close()
    with contextlib.closing(sqlite3.connect(tmp_path / INDEX_FILE)) as db, db:
        db.execute("UPDATE clock SET time = ?, wall = ?, elapsed = ?, boot = ?, shift = ?, away = ?", kept)
    machine.wall -= YEAR
    machine.reboot()
    driver = await Driver.open(tmp_path, times=machine.times)
    await driver.put("b", context(10))
    first, second = driver.store.agents(TENANT)
    assert first.last_used_time <= second.last_used_time
    await driver.close()


@pytest.mark.parametrize("shift", [-DAY, -10 * YEAR])
async def test_the_quota_takes_what_is_unused_for_longest_whatever_the_clock_is_set_to(
    tmp_path: Path, shift: float
) -> None:
    machine = Machine()
    driver = await Driver.open(tmp_path, disk_bytes=3_000_000, times=machine.times)
    for number in range(3):
        machine.pass_time(60)
        await driver.put(f"old-{number}", context([number] * 700))
    await driver.close()
    machine.wall += shift
    machine.reboot()
    driver = await Driver.open(tmp_path, disk_bytes=3_000_000, times=machine.times)
    for number in range(3, 30):
        machine.pass_time(60)
        await driver.put(f"new-{number}", context([number] * 700))
        if lost(driver):
            break
    assert lost(driver) == ["old-0", "old-1", "old-2"][: len(lost(driver)) or 1]
    await driver.close()


def lost(driver: Driver) -> list[str]:
    """Agents of which the quota has taken something; all have as many tokens."""
    whole = max(agent.warm_bytes for agent in driver.store.agents(TENANT))
    return [agent.agent_id for agent in driver.store.agents(TENANT) if agent.warm_bytes < whole]


def times(driver: Driver) -> dict[str, float]:
    """Of the only agent."""
    (agent,) = driver.store.agents(TENANT)
    assert agent.expire_time is not None
    return {
        "created": agent.create_time,
        "updated": agent.update_time,
        "used": agent.last_used_time,
        "expires": agent.expire_time,
    }


async def test_people_are_shown_the_time_of_the_wall(tmp_path: Path) -> None:
    machine = Machine()
    driver = await Driver.open(tmp_path, times=machine.times)
    _, first = await driver.put("a", context(10), ttl=5 * HOUR)
    assert first.agent.last_used_time == first.agent.create_time == machine.wall
    shown = times(driver)
    for step in (-YEAR, 3 * YEAR):
        machine.pass_time(HOUR)
        machine.wall += step
        shown = times(driver)
        assert shown["expires"] == shown["used"] + 5 * HOUR
        machine.wall += 0.4  # less than anybody sets a clock by
        assert times(driver) == shown
    assert abs(shown["used"] - (machine.wall - 2 * HOUR)) < 1
    await driver.close()
    driver = await Driver.open(tmp_path, times=machine.times)
    assert times(driver) == shown
    await driver.close()


def test_no_moment_is_shown_that_a_timestamp_cannot_say() -> None:
    clock = Clock(source=Machine(wall=-1e12).times)
    assert clock.shown(clock.now()) == 0.0
    assert clock.shown(clock.now() + 1e300) == LATEST


@pytest.mark.parametrize(
    "damage", ["DROP TABLE clock", "DELETE FROM clock", "UPDATE clock SET time = 1e300, wall = 'x'"]
)
async def test_without_a_written_time_it_goes_on_from_the_last_use(tmp_path: Path, damage: str) -> None:
    """Also in an index of before it was written down."""
    machine = Machine()
    driver = await Driver.open(tmp_path, times=machine.times)
    await remember(driver)
    await driver.put("minutes", context(10), ttl=600.0)
    await driver.close()
    with contextlib.closing(sqlite3.connect(tmp_path / INDEX_FILE)) as db, db:
        db.execute(damage)
    machine.pass_time(60)
    machine.wall -= DAY
    driver = await Driver.open(tmp_path, times=machine.times)
    assert await is_remembered(driver)
    assert "minutes" in names(driver)
    machine.pass_time(601)
    await driver.put("b", context(10))
    await eventually(lambda: "minutes" not in names(driver))
    await driver.close()
