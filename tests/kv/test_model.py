"""The store against a dictionary: whatever happens to it and to its files, no agent is lost and no word is wrong."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.kv.books import check_directory, check_sums
from tests.kv.disk import RefusingFiles, make_index_refuse
from tests.kv.driver import FINGERPRINT, OTHER_MODEL, TENANT, Driver
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.kv import KVLayout, PartKind
from warmkv_server.contract.names import hidden_id
from warmkv_server.errors import MemoryBudget, NotDurable, OperatorError, StorageUnavailable
from warmkv_server.kv.blocks import reader
from warmkv_server.kv.blocks.disk import object_path
from warmkv_server.kv.blocks.tier import BlockTier
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.index.index import common_length
from warmkv_server.kv.index.records import TokenIds

T = TypeVar("T")

AGENTS = st.sampled_from(["a", "b", "c", "d"])
RAM_DISK = Path("/dev/shm")
HIDDEN_BYTES = 400_000
# Contexts that have long prefixes in common: each piece is the beginning of one of three streams of tokens.
PIECES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400)), min_size=1, max_size=3)


def tokens_of(pieces: list[tuple[int, int]]) -> TokenIds:
    return context(*[(np.arange(count) * 7 + stream * 1000).tolist() for stream, count in pieces])


@dataclass
class Known:
    """What an agent must be."""

    tokens: TokenIds
    revision: int
    foreign: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    durable: bool = True


class StoreMachine(RuleBasedStateMachine):
    layout: KVLayout

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="warmkv-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
        self.data = self.folder / "0"
        self.driver: Driver | None = None
        self.agents: dict[str, Known] = {}
        self.durable: dict[str, Known] = {}
        self.damaged = False
        self.files = RefusingFiles()
        self.index_refuses = False
        self.refused = False
        self.fingerprint = FINGERPRINT
        self.small = reader.SMALL_BYTES

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @property
    def d(self) -> Driver:
        assert self.driver is not None
        return self.driver

    def start(self) -> None:
        self.files = RefusingFiles()
        self.index_refuses = self.refused = False
        self.agents = {agent: replace(known) for agent, known in self.durable.items()}
        changes: dict[str, Any] = {"hot_bytes": 400_000, "retry_seconds": 3600.0, "anonymous_bytes": HIDDEN_BYTES}
        opening = Driver.open(self.data, self.layout, self.fingerprint, files=self.files, tier=self.tier(), **changes)
        self.driver = self.run(opening)

    @initialize(small=st.sampled_from([0, reader.SMALL_BYTES]))
    def open(self, small: int) -> None:
        self.small, reader.SMALL_BYTES = reader.SMALL_BYTES, small  # files are read in one of two ways
        self.start()

    def teardown(self) -> None:
        reader.SMALL_BYTES = self.small
        if self.driver is not None:
            self.run(self.driver.close())
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Where blocks are; another tier has them elsewhere

    def tier(self) -> BlockTier | None:
        """For the next start; None for the data directory."""
        return None

    def fork_tier(self) -> Callable[[], None]:
        """Have its state kept as it is now; what this returns goes on from there. Copies of the directory have it."""
        return lambda: None

    def objects(self) -> list[str]:
        return sorted(path.name for path in self.data.glob("blocks/*/*.safetensors"))

    def content(self, name: str) -> bytes:
        return object_path(self.data, name).read_bytes()

    def put_content(self, name: str, content: bytes | None) -> None:
        path = object_path(self.data, name)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)

    # What clients do

    @rule(agent=AGENTS, pieces=PIECES, keep=st.booleans())
    def replace(self, agent: str, pieces: list[tuple[int, int]], keep: bool) -> None:
        tokens = tokens_of(pieces)
        keeping = {len(tokens) - 1, len(tokens)} - {0} if keep else set()
        self.put(agent, tokens, answer=False, keep=keeping)

    @rule(agent=AGENTS, pieces=PIECES)
    def go_on(self, agent: str, pieces: list[tuple[int, int]]) -> None:
        before = self.agents[agent].tokens.tolist() if agent in self.agents else []
        self.put(agent, context(before, tokens_of(pieces).tolist()), answer=True, keep=set())

    @rule(agent=AGENTS, cut=st.integers(1, 300))
    @precondition(lambda self: self.agents)
    def cut(self, agent: str, cut: int) -> None:
        if agent in self.agents and len(self.agents[agent].tokens) > cut:
            self.put(agent, self.agents[agent].tokens[:-cut], answer=False, keep=set())

    def put(self, agent: str, tokens: TokenIds, *, answer: bool, keep: set[int]) -> None:
        known = self.agents.get(agent)
        try:
            reuse, committed = self.run(self.d.put(agent, tokens, answer=answer, keep=keep))
        except MemoryBudget:
            assert self.refusing
            return
        assert committed.persisted or self.refusing
        own = known is not None and not known.foreign
        if own and known is not None and not self.damaged and not self.layout.partial and not self.layout.has_state:
            common = min(common_length(known.tokens, tokens), len(tokens) - answer)
            assert reuse.length >= common
        changed = known is None or not np.array_equal(known.tokens, tokens)
        revision = (known.revision if known is not None else 0) + changed
        assert committed.agent.revision == revision
        labels = known.labels if known is not None else {}
        self.agents[agent] = Known(tokens, revision, labels=labels, durable=committed.persisted)
        if committed.persisted:
            self.durable[agent] = replace(self.agents[agent])

    @rule(pieces=PIECES, more=PIECES)
    def keep_without_an_agent(self, pieces: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
        """A request that names no agent, and one that goes on with it."""
        first = tokens_of(pieces)
        for tokens in (first, context(first.tolist(), tokens_of(more).tolist())):
            try:
                _, committed = self.run(self.d.put("", tokens, kept_as=hidden_id(), ttl=3600.0, answer=True))
            except StorageUnavailable:
                assert self.refusing
                return
            assert committed.persisted
            self.run(self.d.store.settled())
            if not self.refusing:
                core = self.d.store.core
                there = [a for a in core.index.agents.values() if a.hidden and a.fingerprint == core.fingerprint]
                begin = [a for a in there if np.array_equal(a.tokens, tokens[: len(a.tokens)])]
                assert len(begin) <= 1  # itself, unless it is too large

    @property
    def refusing(self) -> bool:
        return self.index_refuses or self.files.refusal is not None

    @rule(source=AGENTS, fork=AGENTS)
    def fork_agent(self, source: str, fork: str) -> None:
        if source in self.agents and fork not in self.agents:
            known = self.agents[source]
            try:
                self.run(self.d.store.fork(TENANT, source, fork))
            except StorageUnavailable:
                assert self.index_refuses or not known.durable
                return
            self.agents[fork] = Known(known.tokens, 1, known.foreign, known.labels)
            self.durable[fork] = replace(self.agents[fork])

    @rule(agent=AGENTS)
    def evict(self, agent: str) -> None:
        if agent in self.agents:
            self.try_to_evict(agent)

    def try_to_evict(self, agent: str) -> None:
        try:
            self.run(self.d.store.evict(TENANT, agent))
        except NotDurable:
            assert not self.agents[agent].durable

    @rule(agent=AGENTS)
    def delete(self, agent: str) -> None:
        try:
            existed = self.run(self.d.store.delete(TENANT, agent))
        except StorageUnavailable:
            assert self.refusing
            return
        assert existed == (agent in self.agents)
        self.agents.pop(agent, None)
        self.durable.pop(agent, None)

    @rule(agent=AGENTS, value=st.text("xyz", max_size=2), pinned=st.booleans())
    def update(self, agent: str, value: str, pinned: bool) -> None:
        if agent in self.agents:
            try:
                self.run(self.d.store.update(TENANT, agent, labels={"k": value}, pinned=pinned))
            except StorageUnavailable:
                assert self.index_refuses or agent not in self.durable
                return
            self.agents[agent].labels = {"k": value}
            self.durable[agent].labels = {"k": value}

    @rule(agent=AGENTS, pieces=PIECES)
    def look(self, agent: str, pieces: list[tuple[int, int]]) -> None:
        tokens = tokens_of(pieces)
        self.run(self.d.reuse(agent, tokens))
        self.run(self.d.reuse("", tokens, limit=len(tokens) - 1))

    @rule(agent=AGENTS, pieces=PIECES)
    @precondition(lambda self: not self.refusing)
    def delete_while_committing(self, agent: str, pieces: list[tuple[int, int]]) -> None:
        before = self.agents[agent].tokens.tolist() if agent in self.agents else []
        tokens = context(before, tokens_of(pieces).tolist())

        async def both() -> None:
            await asyncio.gather(self.d.put(agent, tokens), self.d.store.delete(TENANT, agent), return_exceptions=True)
            # A delete that came before the agent was there has found nothing to delete.
            await self.d.store.delete(TENANT, agent)

        self.run(both())
        self.agents.pop(agent, None)
        self.durable.pop(agent, None)

    # What happens to disks

    @rule(code=st.sampled_from([errno.ENOSPC, errno.EROFS, errno.EIO]), files=st.booleans(), index=st.booleans())
    def refuse(self, code: int, files: bool, index: bool) -> None:
        self.files.refusal = code if files else None
        self.index_refuses = index
        self.refused |= files or index
        make_index_refuse(self.d, index)

    @rule()
    def recover(self) -> None:
        self.files.refusal = None
        self.index_refuses = False
        make_index_refuse(self.d, False)
        assert self.run(self.d.store.flush())
        for known in self.agents.values():
            known.durable = True
        self.durable = {agent: replace(known) for agent, known in self.agents.items()}

    # What happens to servers

    @rule()
    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        # The end of a server tries once more; what lacked only its row may go through though files are refused.
        if not self.refusing:
            self.recover()
        self.run(self.d.store.flush())
        for record in self.d.store.agents(TENANT):
            if record.durable:
                self.agents[record.agent_id].durable = True
                self.durable[record.agent_id] = replace(self.agents[record.agent_id])
        self.run(self.d.close())

    @rule()
    def crash(self) -> None:
        """Go on from a copy of the files as they are now, without any of the orderly end."""
        number = int(self.data.name) + 1
        copy = self.folder / str(number)
        shutil.copytree(self.data, copy)
        go_on = self.fork_tier()
        durable = {agent: replace(known) for agent, known in self.durable.items()}
        self.stop()
        self.durable = durable
        shutil.rmtree(self.data)
        self.data = copy
        go_on()
        self.start()

    @rule(how=st.sampled_from(["gone", "empty", "garbage", "half"]), crash=st.booleans())
    @precondition(lambda self: not self.refusing)
    def lose_index(self, how: str, crash: bool) -> None:
        """What the manifests and the block files say is all that is left."""
        if crash:
            self.recover()
            self.crash()
        self.stop()
        path = self.data / "index.sqlite"
        content = path.read_bytes()
        match how:
            case "gone":
                path.unlink()
            case "empty":
                path.write_bytes(b"")
            case "garbage":
                path.write_bytes(bytes(len(content)))
            case "half":
                path.write_bytes(content[: len(content) // 2])
        try:
            self.start()
        except OperatorError:
            assert not self.durable  # Files that were not collected yet, and nobody to tell whose they were.
            shutil.rmtree(self.data)
            self.start()
        for agent in self.agents.keys() - {record.agent_id for record in self.d.store.agents(TENANT)}:
            # The only file with some of its tokens was damaged.
            assert self.damaged
            del self.agents[agent], self.durable[agent]

    @rule()
    def change_model(self) -> None:
        self.stop()
        self.fingerprint = OTHER_MODEL if self.fingerprint is FINGERPRINT else FINGERPRINT
        for known in self.durable.values():
            known.foreign = not known.foreign
        self.start()

    # What happens to files

    @rule(seed=st.integers(0, 2**32), how=st.sampled_from(["flip", "cut", "lose", "swap", "header", "empty"]))
    def damage(self, seed: int, how: str) -> None:
        rng = random.Random(seed)
        names = [name for name in self.objects() if self.content(name)]
        if not names:
            return
        self.damaged = True
        name = rng.choice(names)
        content: bytearray | None = bytearray(self.content(name))
        assert content is not None
        match how:
            case "flip":
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case "cut":
                content = content[: rng.randrange(len(content))]
            case "lose":
                content = None
            case "swap":
                content = bytearray(self.content(rng.choice(names)))
            case "header":
                content = bytearray(rng.randbytes(64)) + content[64:]
            case "empty":
                content = bytearray()
        self.put_content(name, None if content is None else bytes(content))
        if rng.random() < 0.5:
            for agent in self.agents:
                self.try_to_evict(agent)

    @invariant()
    def agents_are_known(self) -> None:
        if self.driver is None:
            return
        listed = list(self.d.store.agents(TENANT))
        assert [record.agent_id for record in listed] == sorted(self.agents)
        for record in listed:
            known = self.agents[record.agent_id]
            assert record.durable == known.durable
            assert record.revision == known.revision
            assert record.fingerprint_ok == (not known.foreign)
            assert record.labels == known.labels
            assert np.array_equal(self.d.store.tokens(TENANT, record.agent_id), known.tokens)

    @invariant()
    def books_are_balanced(self) -> None:
        if self.driver is None:
            return
        self.run(self.d.store.settled())
        check_sums(self.d.store)
        assert self.refusing or self.refused or self.d.store.stats().hidden_bytes <= HIDDEN_BYTES
        if not self.damaged:
            check_directory(self.d.store, self.data)
        if not self.settled:
            return
        core = self.d.store.core
        for node in core.index.nodes.values():
            assert node.agents
            assert node.pins == 0
            assert node.saved
            # A commit that comes to nothing may have replaced a damaged file; the next one writes the row.
            assert self.damaged or not node.dirty
        assert not core.hot.unsaved_bytes
        assert not core.accounts.going
        names = {name for name, _ in core.tier.list()}
        expected = {name for node in core.index.nodes.values() for name in node.object_names()}
        # What a rebuilt index doesn't claim stays.
        assert names <= expected | rows.read_spared(core.journal.database)
        if not self.damaged:
            assert expected <= names
            for agent in core.index.agents.values():
                assert all(PartKind.APPEND in node.parts for node in agent.nodes)

    @property
    def settled(self) -> bool:
        """Whether all that the disk ever refused has been made up for."""
        return not self.refusing and all(known.durable for known in self.agents.values()) and not self.refused


def machine(name: str) -> type[StoreMachine]:
    return type(f"Store_{name}", (StoreMachine,), {"layout": LAYOUTS[name]})


SETTINGS = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)

TestAppend = machine("append").TestCase
TestAppend.settings = SETTINGS
TestWindow = machine("window").TestCase
TestWindow.settings = SETTINGS
TestSmallWindow = machine("small_window").TestCase
TestSmallWindow.settings = SETTINGS
TestHybrid = machine("hybrid").TestCase
TestHybrid.settings = SETTINGS
TestRecurrent = machine("recurrent").TestCase
TestRecurrent.settings = SETTINGS
TestEverything = machine("everything").TestCase
TestEverything.settings = SETTINGS
