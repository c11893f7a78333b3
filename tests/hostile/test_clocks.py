"""Machines whose wall clock is set back and forth, between two runs of a server and within one.

The server's Python reads a clock that is off by what a file says; everything else is as it is.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.harness import WARMKV, Client, clean_environment, serving, some_tokens, text, token_ids
from tests.e2e.waiting import await_that, found
from warmkv import v1

HOUR, DAY, YEAR = 3600, 86400, 365 * 86400
_SHIFTED = """
import os, time
real = time.time
def shifted():
    with open(os.environ["SHIFT"]) as file:
        shift = file.read()
    if shift == "beyond":
        raise OverflowError("timestamp too large to convert to C _PyTime_t")
    return real() + float(shift or 0)
time.time = shifted
"""


class WallClock:
    """What the server's clock is off by, in seconds."""

    def __init__(self, folder: Path) -> None:
        self._shift = folder / "shift"
        python = folder / "python"
        python.mkdir()
        (python / "sitecustomize.py").write_text(_SHIFTED)
        self.environment = {"PYTHONPATH": str(python), "SHIFT": str(self._shift)}
        self.set(0)

    def set(self, shift: float | str) -> None:
        new = self._shift.with_suffix(".new")
        new.write_text(str(shift))
        new.rename(self._shift)


@pytest.fixture
def wall(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


@contextmanager
def running(tmp_path: Path, wall: WallClock, *arguments: str) -> Iterator[Client]:
    """A server for the block, killed at its end."""
    with serving(tmp_path / "data", *arguments, environment=wall.environment) as (_, client):
        yield client


def test_a_request_runs_once_though_the_clock_goes_two_hours_forward(tmp_path: Path, wall: WallClock) -> None:
    content = token_ids(some_tokens(50))
    with running(tmp_path, wall) as client:
        client.prime("a", text("once upon a time"))
        first = client.extend("a", content, request_id="once")
        wall.set(2 * HOUR)
        client.prime("other", text("wakes those who look for what is old"))
        assert client.extend("a", content, request_id="once") == first
    wall.set(4 * HOUR)
    with running(tmp_path, wall) as client:
        client.prime("other", text("once more"))
        assert client.extend("a", content, request_id="once") == first
        assert (client.get("a").token_count, client.get("a").revision) == (first.agent.token_count, 2)


def test_a_lifetime_ends_though_the_clock_goes_ten_years_back(tmp_path: Path, wall: WallClock) -> None:
    hour, moment = v1.Agent(agent_id="short"), v1.Agent(agent_id="short")
    hour.ttl.FromSeconds(HOUR)
    moment.ttl.FromMilliseconds(200)
    with running(tmp_path, wall) as client:
        client.prime("short", text("not for long"))
        client.update(hour, "ttl")
    wall.set(-10 * YEAR)
    with running(tmp_path, wall) as client:
        client.update(moment, "ttl")
        await_that(lambda: not found(client, "short"))
        client.prime("short", text("once more"))
        wall.set(-20 * YEAR)
        client.update(moment, "ttl")
        await_that(lambda: not found(client, "short"))


def test_the_quota_takes_what_is_unused_though_the_clock_goes_a_day_back(tmp_path: Path, wall: WallClock) -> None:
    """The oldest goes, and what was made last stays."""
    limit, size = ("--disk-bytes", str(4 << 20)), 1000
    with running(tmp_path, wall, *limit) as client:
        for number in (1, 2):
            client.prime(f"old-{number}", token_ids(some_tokens(size, number)))
        whole = client.get("old-2").warm_bytes
    wall.set(-DAY)
    with running(tmp_path, wall, *limit) as client:
        for number in range(20):
            client.prime(f"new-{number}", token_ids(some_tokens(size, 2000 + number)))
            lost = [agent.agent_id for agent in client.list(page_size=100).agents if agent.warm_bytes < whole]
            if lost:
                break
        assert lost in (["old-1"], ["old-1", "old-2"])
        assert client.get(f"new-{number}").warm_bytes == whole


def test_a_clock_beyond_what_can_be_told_is_named_at_start(tmp_path: Path, wall: WallClock) -> None:
    wall.set("beyond")
    done = subprocess.run(
        [WARMKV, "serve", "--port", "0", "--data-dir", tmp_path / "data"],
        env=clean_environment() | wall.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "the year 2262" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
