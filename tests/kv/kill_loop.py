"""kill -9, again and again, on a server's store at work; run by test_kill.py.

    python -m tests.kv.kill_loop DIRECTORY TRIALS SEED

A victim works on a store and logs each operation before it begins and when it is acknowledged. It is killed at a random
moment; a judge opens the same directory and compares. Both are forked from this process, which has imported
everything and used nothing, so that a trial takes a fraction of a second.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from tests.kv.driver import TENANT, Driver
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.store import Durability
from warmkv_server.errors import OperatorError, WarmKVError
from warmkv_server.kv.blocks.disk import block_files
from warmkv_server.kv.index.records import TokenIds

AGENTS = "abcde"
Pieces = list[tuple[int, int]]


def tokens_of(pieces: Pieces) -> TokenIds:
    return context(*[(np.arange(count) * 3 + stream * 500).tolist() for stream, count in pieces])


class Log:
    """Lines that survive the death of their writer: one write call each, straight into the page cache."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._next = 0

    def begin(self, agent: str, after: Pieces | None) -> int:
        """Note that the agent is about to become this context, or to go."""
        self._next += 1
        self._write({"begin": self._next, "agent": agent, "after": after})
        return self._next

    def manifests_are_right(self) -> None:
        """Note that they say what the index says."""
        self._write({"manifests": True})

    def done(self, number: int, *, happened: bool) -> None:
        self._write({"done": number, "happened": happened})

    def _write(self, entry: dict[str, Any]) -> None:
        os.write(self._fd, json.dumps(entry).encode() + b"\n")


class Victim:
    def __init__(self, driver: Driver, log: Log, seed: int, known: dict[str, Pieces]) -> None:
        self.driver = driver
        self.log = log
        self.rng = random.Random(seed)
        self.known = known
        self.busy: set[str] = set()

    async def work(self) -> None:
        """Until killed: three streams of operations at once, on different agents, and a delete into one of them."""
        await asyncio.gather(*(self._stream() for _ in range(3)))

    async def _stream(self) -> None:
        while True:
            agent = self.rng.choice([a for a in AGENTS if a not in self.busy])
            self.busy.add(agent)
            operation = self.rng.choices(
                [self._grow, self._replace, self._cut, self._fork, self._evict, self._delete, self._race],
                [8, 3, 3, 2, 3, 2, 1],
            )[0]
            await operation(agent)
            self.busy.discard(agent)
            await asyncio.sleep(0)

    async def _become(self, agent: str, after: Pieces) -> None:
        number = self.log.begin(agent, after)
        _, committed = await self.driver.put(agent, tokens_of(after), keep={self.rng.randint(1, 300)})
        assert committed.persisted
        self.log.done(number, happened=True)
        self.known[agent] = after

    async def _grow(self, agent: str) -> None:
        pieces = [(self.rng.randrange(3), self.rng.randint(1, 200))]
        await self._become(agent, [*self.known.get(agent, [])[-8:], *pieces])

    async def _replace(self, agent: str) -> None:
        await self._become(agent, [(self.rng.randrange(3), self.rng.randint(1, 600))])

    async def _cut(self, agent: str) -> None:
        if self.known.get(agent):
            *before, (stream, count) = self.known[agent]
            await self._become(agent, [*before, (stream, self.rng.randint(1, count))])

    async def _fork(self, agent: str) -> None:
        source = self.rng.choice(AGENTS)
        if agent in self.known or source not in self.known or source in self.busy:
            return
        number = self.log.begin(agent, self.known[source])
        await self.driver.store.fork(TENANT, source, agent)
        self.known[agent] = self.known[source]
        self.log.done(number, happened=True)

    async def _evict(self, agent: str) -> None:
        if agent in self.known:
            await self.driver.store.evict(TENANT, agent)

    async def _delete(self, agent: str) -> None:
        number = self.log.begin(agent, None)
        await self.driver.store.delete(TENANT, agent)
        self.known.pop(agent, None)
        self.log.done(number, happened=True)

    async def _race(self, agent: str) -> None:
        """A delete while a commit is on its way: whichever way the commit ends, the agent is gone."""
        if agent not in self.known:
            return
        after = [*self.known[agent][-8:], (1, 300)]
        first, second = self.log.begin(agent, after), self.log.begin(agent, None)

        async def commit() -> bool:
            try:
                await self.driver.put(agent, tokens_of(after))
            except (WarmKVError, AssertionError):
                return False
            return True

        _, deleted = await asyncio.gather(commit(), self.driver.store.delete(TENANT, agent))
        assert deleted
        self.log.done(first, happened=False)
        self.log.done(second, happened=True)
        self.known.pop(agent, None)


def allowed(log: Path) -> dict[str, list[Pieces | None]]:
    """What each agent may be: what was acknowledged last, or what any operation still in flight makes of it."""
    acknowledged: dict[str, Pieces | None] = dict.fromkeys(AGENTS)
    pending: dict[int, tuple[str, Pieces | None]] = {}
    for line in log.read_bytes().split(b"\n"):
        if not line:
            continue
        entry = json.loads(line)
        if "begin" in entry:
            pending[entry["begin"]] = entry["agent"], entry["after"]
        elif "done" in entry:
            agent, after = pending.pop(entry["done"])
            if entry["happened"]:
                acknowledged[agent] = after
    return {
        agent: [state, *(after for a, after in pending.values() if a == agent)] for agent, state in acknowledged.items()
    }


def allowed_without_index(log: Path) -> dict[str, list[Pieces | None]]:
    """What a manifest may say of each agent: any state since the manifests were known to be right, but nothing from
    before a deletion."""
    states: dict[str, list[Pieces | None]] = {agent: [None] for agent in AGENTS}
    deletions: dict[int, str] = {}
    for line in log.read_bytes().splitlines():
        entry = json.loads(line)
        if "begin" in entry:
            states[entry["agent"]].append(entry["after"])
            if entry["after"] is None:
                deletions[entry["begin"]] = entry["agent"]
        elif "manifests" in entry:
            states = {agent: known[-1:] for agent, known in states.items()}
        elif entry["done"] in deletions:
            states[deletions[entry["done"]]] = [None]
    return states


async def judge_without_index(data: Path, layout: str, log: Path) -> None:
    """Lose the index of a copy: no agent may be gone for good, be what it never was, or come back from the dead."""
    copy = data.with_name("without_index")
    shutil.copytree(data, copy, copy_function=os.link, ignore=shutil.ignore_patterns("index.sqlite*", "lock"))
    states = allowed_without_index(log)
    try:
        driver = await Driver.open(copy, LAYOUTS[layout])
    except OperatorError:
        assert all(None in candidates for candidates in states.values()), "there are no manifests"
    else:
        for agent, candidates in states.items():
            if driver.store.agent(TENANT, agent) is None:
                assert None in candidates, f"{agent} is gone without an index; it may be {candidates}"
                continue
            tokens = driver.store.tokens(TENANT, agent)
            fits = any(c is not None and np.array_equal(tokens_of(c), tokens) for c in candidates)
            assert fits, f"{agent} has {len(tokens)} tokens without an index; it may be {candidates}"
            reuse = await driver.reuse(agent, tokens)
            assert reuse.length == len(tokens), f"{agent}: {reuse.length} of {len(tokens)} tokens without an index"
        await driver.close()
    shutil.rmtree(copy)


async def judge(data: Path, layout: str, log: Path, verdict: Path) -> None:
    """Compare, and write down what every agent is now."""
    await judge_without_index(data, layout, log)
    driver = await Driver.open(data, LAYOUTS[layout])
    states: dict[str, Pieces] = {}
    for agent, candidates in allowed(log).items():
        record = driver.store.agent(TENANT, agent)
        if record is None:
            assert None in candidates, f"{agent} is gone; it may be {candidates}"
            continue
        tokens = driver.store.tokens(TENANT, agent)
        fits = [c for c in candidates if c is not None and np.array_equal(tokens_of(c), tokens)]
        assert fits, f"{agent} has {len(tokens)} tokens; it may be {candidates}"
        states[agent] = fits[0]
        reuse = await driver.reuse(agent, tokens)
        assert reuse.length == len(tokens), f"{agent}: {reuse.length} of {len(tokens)} tokens ({reuse.fallback})"
    assert not driver.store.stats().quarantined
    await driver.close()
    assert not any(entry.name.endswith(".tmp") for entry in block_files(data))
    with open(verdict, "w") as file:  # noqa: ASYNC230, PTH123 - nothing else runs here
        json.dump(states, file)


async def be_killed(data: Path, layout: str, log: Path, seed: int, known: dict[str, Pieces], ready: int) -> None:
    driver = await Driver.open(data, LAYOUTS[layout], durability=Durability.FSYNC, manifest_seconds=0.02)
    writer = Log(log)
    for agent, pieces in known.items():
        writer.done(writer.begin(agent, pieces), happened=True)
    writer.manifests_are_right()
    os.write(ready, b"x")
    await Victim(driver, writer, seed, known).work()


def in_child(work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        asyncio.run(work())
    except BaseException as error:
        import traceback

        traceback.print_exc()
        os._exit(1 if isinstance(error, Exception) else 2)
    os._exit(0)


def main(folder: Path, trials: int, seed: int) -> None:
    rng = random.Random(seed)
    known: dict[str, dict[str, Pieces]] = {}
    operations = 0
    for trial in range(trials):
        layout = rng.choice(["append", "everything"])
        data, log, verdict = folder / layout, folder / f"{trial}.log", folder / "verdict"
        reader, writer = os.pipe()
        states = known.setdefault(layout, {})
        victim = in_child(lambda: be_killed(data, layout, log, rng.randrange(2**32), states, writer))  # noqa: B023
        os.close(writer)
        started = os.read(reader, 1)
        time.sleep(rng.uniform(0.0, 0.2))
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        os.close(reader)
        if not started or not os.WIFSIGNALED(status):
            sys.exit(f"trial {trial}: the victim ended by itself")
        operations += log.read_bytes().count(b'"done"')
        if os.waitpid(in_child(lambda: judge(data, layout, log, verdict)), 0)[1]:  # noqa: B023
            sys.exit(f"trial {trial} of seed {seed} ({layout}) failed")
        known[layout] = {
            agent: [(s, c) for s, c in pieces] for agent, pieces in json.loads(verdict.read_text()).items()
        }
    print(f"{trials} trials, {operations} acknowledged operations, all as acknowledged")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
