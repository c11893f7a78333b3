"""The store's face: what agents and the service call.

All state that decides anything lives on the event loop's thread in plain dicts. What blocks runs elsewhere: one thread
for SQLite, a few for files.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, Self, TypeVar

from warmkv_server.contract.fairness import Tenants
from warmkv_server.contract.kv import BLOCK_TOKENS, KVLayout, Reuse, all_kinds, policy_of
from warmkv_server.contract.names import AgentKey, is_hidden
from warmkv_server.contract.pressure import MemoryPressure
from warmkv_server.contract.settings import Settings
from warmkv_server.contract.store import AgentRecord, Durability, StoreStats, Tier
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.blockfile import VERSION
from warmkv_server.kv.blocks.disk import DiskTier
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.blocks.names import EXTRA_KEY_BYTES
from warmkv_server.kv.blocks.tier import BlockTier
from warmkv_server.kv.catalog.clock import TimeSource
from warmkv_server.kv.catalog.journal import Journal
from warmkv_server.kv.catalog.lock import DirectoryLock
from warmkv_server.kv.catalog.startup import open_directory, take_directory
from warmkv_server.kv.index.index import Agent, Node
from warmkv_server.kv.index.likeness import alike
from warmkv_server.kv.index.prefix import Lease, Matcher, Under
from warmkv_server.kv.index.records import (
    UNSET,
    Commit,
    Committed,
    Evicted,
    Fingerprint,
    OutcomeOf,
    RequestOutcome,
    TokenIds,
    Tuning,
    Unset,
)
from warmkv_server.kv.tasks.changes import Changes
from warmkv_server.kv.tasks.collect import Collector
from warmkv_server.kv.tasks.commit import Committer
from warmkv_server.kv.tasks.core import Core
from warmkv_server.kv.tasks.disk_state import DiskState
from warmkv_server.kv.tasks.eviction import Eviction
from warmkv_server.kv.tasks.held_contexts import HeldContexts
from warmkv_server.kv.tasks.hidden import HiddenBounds
from warmkv_server.kv.tasks.loader import Loader
from warmkv_server.kv.tasks.manifests import Manifests
from warmkv_server.kv.tasks.outcomes import Outcomes
from warmkv_server.kv.tasks.parts import PartWriter
from warmkv_server.kv.tasks.quota import Quota
from warmkv_server.kv.tasks.upkeep import Upkeep

__all__ = [
    "UNSET",
    "AgentRecord",
    "Commit",
    "Committed",
    "Durability",
    "Evicted",
    "Fingerprint",
    "HeldContexts",
    "Lease",
    "OutcomeOf",
    "RequestOutcome",
    "Store",
    "StoreStats",
    "Tier",
    "TokenIds",
    "Tuning",
    "Unset",
]

T = TypeVar("T")


class Store:
    """The contexts of all agents. Make one with `Store.open`; all methods are called on the event loop's thread."""

    def __init__(self, core: Core, lock: DirectoryLock) -> None:
        self._core = core
        self._lock = lock
        self._collector = Collector(core, was_refused=lambda: self._upkeep.wake())
        self._manifests = Manifests(core, self._collector.suspect)
        self._loader = Loader(core, self._manifests)
        self._hidden = HiddenBounds(core, self.delete)
        quota = Quota(core, self._collector, self._manifests, self._hidden.shed)
        writer = PartWriter(core, self._loader, quota)
        self._committer = Committer(core, writer, self._collector, self._manifests)
        self._matcher = Matcher(core.index, core.layout, core.has)
        self._changes = Changes(
            core, self._committer, self._collector, self._manifests, changed=lambda: self._upkeep.wake()
        )
        self._eviction = Eviction(core)
        self._upkeep = Upkeep(core, self._committer, self._collector, self._manifests, self.delete)
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    async def take(cls, settings: Settings) -> DirectoryLock:
        """Make the data directory if there is none, and lock it: what `open` does first, before there is a model.

        Raises:
            OperatorError: it is in use, or can't be written.
        """
        return await asyncio.to_thread(take_directory, settings.data_dir, Files(settings.durability))

    @classmethod
    async def open(
        cls,
        settings: Settings,
        layout: KVLayout,
        fingerprint: Fingerprint,
        *,
        lock: DirectoryLock | None = None,
        tuning: Tuning | None = None,
        tenants: Tenants | None = None,
        pressure: MemoryPressure | None = None,
        busy: Callable[[], bool] = lambda: False,
        tell: Callable[[bool], object] = lambda _: None,
        files: Files | None = None,
        times: TimeSource | None = None,
        tier: BlockTier | None = None,
    ) -> Self:
        """Lock the directory, read the index, sweep what a crash left behind.

        Args:
            lock: of the directory, from `take`; None to take it now.
            tenants: that share the budgets. How many have something to lose is seen; this is for what can't be taken
                back, RAM that holds what the disk refused.
            pressure: where memory runs out; the store then lets go of RAM copies.
            busy: whether somebody decodes: then large commits are written one file at a time, with pauses. Called from
                several threads.
            tell: called now, and at every change, with whether the disk has every agent's last commit.
            files: a stand-in for the disk, for tests.
            times: a stand-in for the machine's clocks, for tests.
            tier: where blocks are, if not in the data directory.

        Raises:
            OperatorError: the directory is in use, can't be written, or was written by a newer version; or the quota
                is too small for one block.
        """
        _require_room(settings.disk_bytes, layout)
        tuning = tuning or Tuning()
        files = files or Files(settings.durability, settings.headroom_bytes, busy)
        tier = tier or DiskTier(settings.data_dir, files, tuning.quarantine_limit(settings.disk_bytes))
        lock = lock or await cls.take(settings)
        opened = await asyncio.to_thread(
            open_directory, lock, settings, tuning, layout, fingerprint, files, tier, times
        )
        journal = Journal(opened.database, opened.commits)
        core = Core(
            settings,
            tuning,
            tenants or Tenants(),
            layout,
            opened.fingerprint.digest,
            opened.index,
            journal,
            Outcomes(journal, tuning.outcome_bytes, opened.outcomes),
            files,
            tier,
            opened.clock,
            opened.foreign,
            DiskState(tell),
        )
        core.quarantine_bytes, core.aside_bytes = opened.quarantine_bytes, opened.aside_bytes
        core.manifest_sizes = opened.manifests.sizes
        core.manifest_bytes = sum(core.manifest_sizes.values())
        store = cls(core, lock)
        for agent in opened.manifests.stale:
            store._manifests.note(agent)
        if core.index.hidden:
            store._begin(store._hidden.after_start())
        if pressure is not None:
            pressure.listen(store.relieve)
        return store

    async def close(self) -> None:
        """Wait for what is in flight, then let go of the directory."""
        await self._upkeep.close()
        await self.flush()
        await self.settled()
        await self._manifests.close()
        await self._core.journal.close()
        await asyncio.to_thread(self._core.shutdown)  # a read that nobody waits for may be at work
        self._lock.release()

    async def settled(self) -> None:
        """Wait for everything in flight, collection included."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._loader.idle()
        await self._manifests.flush()
        await self._collector.idle()

    async def flush(self) -> bool:
        """Try now to write what the disk has refused. Whether every agent is durable afterwards."""
        return await self._finish(self._flush())

    async def _flush(self) -> bool:
        durable = await self._committer.retry_all()
        await self._collector.retry()
        return durable

    def owed(self) -> list[tuple[str, str]]:
        """Tenant and agent_id of those whose last commit the disk has refused, or not taken yet; sorted."""
        refused = [agent.key for agent in self._committer.not_durable]
        return sorted({*refused, *self._committer.tickets})

    def stalled_seconds(self, *, reads: bool = False) -> float:
        """How long the disk has not answered: the age of the oldest write that has not returned.

        Args:
            reads: count reads too, which no request waits for longer than its patience.
        """
        at_work = [self._core.writes, self._core.journal.in_flight, *([self._core.reads] if reads else [])]
        return max(each.longest() for each in at_work)

    # Looking

    @property
    def core(self) -> Core:
        """What the store's parts share, for whoever checks it; nobody else changes anything in it."""
        return self._core

    @property
    def manifests(self) -> Manifests:
        """What keeps the agents' manifests behind their commits; for the same."""
        return self._manifests

    @property
    def fingerprint(self) -> str:
        """Digest of what the KV of the served model depends on besides the tokens, as this directory knows it."""
        return self._core.fingerprint

    @property
    def block_format(self) -> int:
        """The version in which blocks are written."""
        return VERSION

    def agent(self, tenant: str, agent_id: str) -> AgentRecord | None:
        agent = self._core.index.agents.get(AgentKey(tenant, agent_id))
        return None if agent is None else self._core.record(agent)

    def agents(self, tenant: str, after: str = "") -> Iterator[AgentRecord]:
        """A tenant's agents by agent_id, from the first one behind `after`; hidden ones are not among them."""
        for agent_id in self._core.index.names(tenant, after):
            agent = self._core.index.agents.get(AgentKey(tenant, agent_id))
            if agent is not None:
                yield self._core.record(agent)

    def tokens(self, tenant: str, agent_id: str) -> TokenIds:
        """The committed context, read-only.

        Raises:
            AgentNotFound
        """
        return self._core.existing(tenant, agent_id).tokens

    def held(self, tenant: str) -> HeldContexts:
        """What of a tenant's contexts is at hand, and how that changes, for one reader. To be closed."""
        return HeldContexts(self._core, tenant)

    async def outcome(self, tenant: str, request_id: str) -> RequestOutcome | None:
        """What the request of this id answered, if it is still kept. Seldom waits; see `Outcomes.find`.

        Raises:
            StorageUnavailable: it can't be looked up.
        """
        return await self._core.outcomes.find(tenant, request_id)

    def stale(self) -> dict[str, int]:
        """Agents of other models or KV settings, by how those differ from what is served; "" where nobody knows."""
        core = self._core
        digests = Counter(agent.fingerprint for agent in self._stale())
        found: Counter[str] = Counter()
        for digest, number in digests.items():
            found[", ".join(core.foreign.differences(digest))] += number
        return dict(found)

    def _stale(self) -> Iterator[Agent]:
        ours = self._core.fingerprint
        return (a for a in self._core.index.agents.values() if a.fingerprint != ours and not a.hidden)

    def tiers(self, tenant: str) -> dict[str, int]:
        """A tenant's agents by tier."""
        return dict(Counter(record.tier.value for record in self.agents(tenant)))

    def stats(self) -> StoreStats:
        core = self._core
        counters, hot = core.counters, core.accounts.hot_agents
        tiers = {Tier.HOT: hot, Tier.WARM: len(core.index.agents) - len(core.index.hidden) - hot}
        return StoreStats(
            bytes_loaded=counters.bytes_loaded,
            kv_bytes_written=counters.kv_bytes_written,
            metadata_bytes_written=core.journal.database.bytes_written
            + core.journal.commits.bytes_written
            + counters.manifest_bytes_written,
            evictions=core.accounts.evictions + counters.evictions,
            quarantined=counters.quarantined,
            commits_failed=counters.commits_failed,
            hot_bytes=core.hot.nbytes,
            disk_bytes=core.disk_bytes,
            outcome_bytes=core.outcomes.nbytes + core.outcomes.owed_bytes,
            agents_by_tier={tier.value: number for tier, number in tiers.items() if number},
            not_durable=len(self._committer.not_durable),
            stale_agents=sum(1 for _ in self._stale()),
            hidden_agents=len(core.index.hidden),
            hidden_bytes=core.index.hidden.nbytes.total(),
        )

    # Reusing

    def resolve(self, tenant: str, agent_id: str, tokens: TokenIds, limit: int, extra_key: bytes = b"") -> Lease:
        """Find the longest prefix of tokens[:limit] whose KV the store has; from memory, at once.

        Args:
            agent_id: "" for a request without an agent: what hidden agents have counts as its own.
            limit: at most so many tokens; one less than all when an answer is to be sampled.
            extra_key: what the KV is a function of besides the tokens and the model, such as a digest of an image.
                Contexts with different ones share nothing.

        Raises:
            ValueError: the extra key is longer than EXTRA_KEY_BYTES.
        """
        if len(extra_key) > EXTRA_KEY_BYTES:
            raise ValueError(f"an extra key of {len(extra_key)} bytes; {EXTRA_KEY_BYTES} are the most")
        core = self._core
        agent = core.index.agents.get(AgentKey(tenant, agent_id)) if agent_id else None
        found = self._matcher.match(agent, Under(core.root(tenant), extra_key), core.fingerprint, tokens[:limit])
        lease = Lease(
            tenant=tenant,
            agent_id=agent_id,
            tokens=tokens,
            incarnation=agent.incarnation if agent is not None else None,
            length=found.prefix.length,
            nodes=list(found.prefix.nodes),
            own_nodes=found.own_nodes if agent_id else _hidden_nodes(found.prefix.nodes),
            snapshot=found.prefix.snapshot,
            fallback=found.fallback,
            extra_key=extra_key,
            on_release=self._collector.suspect,
        )
        lease.pin(*lease.nodes, *([lease.snapshot] if lease.snapshot is not None else []))
        now = core.clock.now()
        if agent is not None:
            agent.last_used = now
            core.used.add(agent)
            lease.hold(agent)
        for node in lease.nodes:
            node.last_used = now
        return lease

    def hidden_like(self, tenant: str, tokens: TokenIds, most: int) -> list[TokenIds]:
        """Contexts of hidden agents that begin most like these, the likest first."""
        core = self._core
        if not core.index.hidden:
            return []
        agents = alike(core.index, core.root(tenant), tokens.astype("<i4").tobytes(), most)
        return [agent.tokens for agent in agents]

    async def load(self, lease: Lease) -> Reuse:
        """Bring a lease's KV into RAM, each file verified before it is used.

        A bad, missing or slow file shortens the result, which then says why; it never raises for one.
        """
        return await self._loader.load(lease)

    async def commit(self, commit: Commit) -> Committed:
        """Make `commit.tokens` the agent's context: files first, then one transaction.

        A disk that refuses (full, read-only, broken) doesn't fail the commit: see `Committed.persisted`. Cancelling the
        caller doesn't stop a commit that has begun.

        Raises:
            AgentDeleted: the incarnation is gone. Nothing is kept.
            AgentExists: the incarnation is None and the agent exists.
            MemoryBudget: the disk refuses, and what it refused before fills the memory budget.
            StorageUnavailable: the disk refuses a hidden agent. Nothing is kept.
        """
        nodes = [*commit.lease.nodes, *([commit.lease.snapshot] if commit.lease.snapshot is not None else [])]
        for node in nodes:
            node.pins += 1
        try:
            committed = await self._finish(self._commit(commit, nodes))
        finally:
            self._upkeep.wake()
        if is_hidden(commit.agent_id):
            self._begin(self._hidden.after_commit(AgentKey(commit.tenant, commit.agent_id)))
        return committed

    async def _commit(self, commit: Commit, pinned: Iterable[Node]) -> Committed:
        try:
            if is_hidden(commit.agent_id):
                await self._hidden.before_commit()
            return await self._committer.commit(commit)
        finally:
            for node in pinned:
                node.pins -= 1
            self._collector.suspect(pinned)

    # Changing

    async def fork(
        self, tenant: str, source_id: str, target_id: str, request: RequestOutcome | OutcomeOf | None = None
    ) -> AgentRecord:
        """A new agent with the source's committed context. Copies a list of node ids, no KV.

        Raises:
            AgentNotFound, AgentExists, StorageUnavailable
        """
        return await self._finish(self._changes.fork(tenant, source_id, target_id, request))

    async def update(
        self,
        tenant: str,
        agent_id: str,
        *,
        pinned: bool | Unset = UNSET,
        ttl: float | Unset | None = UNSET,
        labels: Mapping[str, str] | Unset = UNSET,
    ) -> AgentRecord:
        """Change what is not KV. Durable before it returns.

        Raises:
            AgentNotFound, StorageUnavailable
        """
        return await self._finish(self._changes.update(tenant, agent_id, pinned, ttl, labels))

    async def evict(self, tenant: str, agent_id: str, drop_page_cache: bool = False) -> Evicted:
        """Drop the RAM copy of the agent's nodes, also where others share them.

        Raises:
            AgentNotFound
            NotDurable: RAM holds the only copy.
        """
        return await self._eviction.evict(tenant, agent_id, drop_page_cache)

    def relieve(self) -> int:
        """Let go of half of the RAM copies, least recently used first, as the machine has too little memory; bytes."""
        return self._eviction.relieve()

    async def delete(self, tenant: str, agent_id: str) -> bool:
        """Remove an agent, durably, without reading any of its files. False if there was none.

        Raises:
            StorageUnavailable: the disk doesn't take the deletion; the agent is still there.
        """
        return await self._finish(self._changes.delete(tenant, agent_id))

    # Helpers

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end, even if the caller is cancelled."""
        return await asyncio.shield(self._begin(work))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _hidden_nodes(nodes: Iterable[Node]) -> int:
    """How many of these, from the first, hidden agents reference."""
    return sum(1 for _ in takewhile(lambda node: len(node.agents) > node.named_refs, nodes))


def _require_room(disk_bytes: int, layout: KVLayout) -> None:
    """
    Raises:
        OperatorError: not even one block fits into the quota.
    """
    block = sum(policy_of(kind).nbytes(layout, BLOCK_TOKENS) for kind in all_kinds())
    if 0 < disk_bytes < block:
        raise OperatorError(
            f"--disk-bytes {disk_bytes} is less than one block of {BLOCK_TOKENS} tokens of this model takes, {block} "
            "bytes, so that no context could be kept: give more, or 0 for no limit"
        )
