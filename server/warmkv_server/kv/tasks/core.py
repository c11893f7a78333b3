"""What the parts of the store share: the index, the tiers, the files, and the counters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from warmkv_server.contract.fairness import Tenants
from warmkv_server.contract.kv import KVLayout, PartKind, TensorSpec, all_kinds
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.settings import Settings
from warmkv_server.contract.store import AgentRecord, Tier
from warmkv_server.errors import AgentNotFound
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.blocks.arrays import SpareMemory
from warmkv_server.kv.blocks.blockfile import BlockInfo
from warmkv_server.kv.blocks.files import Files, InFlight
from warmkv_server.kv.blocks.names import root_id
from warmkv_server.kv.blocks.tier import BlockTier
from warmkv_server.kv.catalog.clock import LATEST, Clock
from warmkv_server.kv.catalog.foreign import Foreign
from warmkv_server.kv.catalog.journal import Journal
from warmkv_server.kv.catalog.manifest import FOLDER, file_name
from warmkv_server.kv.index.accounts import Accounts
from warmkv_server.kv.index.hot import HotTier
from warmkv_server.kv.index.index import Agent, Index, Node, block_info
from warmkv_server.kv.index.records import Tuning
from warmkv_server.kv.tasks.disk_state import DiskState
from warmkv_server.kv.tasks.outcomes import Outcomes

BATCH_BYTES = 32 << 20
"""Files that one thread reads before it reports: enough to make the way there and back, and a turn of MLX's, cheap."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Counters:
    """Since the store was opened."""

    bytes_loaded: int = 0
    kv_bytes_written: int = 0
    manifest_bytes_written: int = 0
    evictions: int = 0
    quarantined: int = 0
    commits_failed: int = 0


class Core:
    """Used on the event loop's thread only, but for `info`."""

    def __init__(
        self,
        settings: Settings,
        tuning: Tuning,
        tenants: Tenants,
        layout: KVLayout,
        fingerprint: str,
        index: Index,
        journal: Journal,
        outcomes: Outcomes,
        files: Files,
        tier: BlockTier,
        clock: Clock,
        foreign: Foreign,
        disk: DiskState,
    ) -> None:
        self.settings = settings
        self.tuning = tuning
        self.tenants = tenants
        self.layout = layout
        self.fingerprint = fingerprint
        self.index = index
        self.journal = journal
        self.outcomes = outcomes
        self.files = files
        self.tier = tier
        self.clock = clock
        self.foreign = foreign
        self.hot = HotTier(settings.hot_bytes)
        self.spare = SpareMemory(tuning.io_threads * BATCH_BYTES * 5 // 4)  # about what is read at a time
        self.accounts = Accounts(index, self.hot, layout, fingerprint)
        self.specs: dict[PartKind, tuple[TensorSpec, ...]] = {
            kind: blockfile.ordered(layout.of_kind(kind)) for kind in all_kinds()
        }
        self.counters = Counters()
        self.disk = disk
        self.used: set[Agent] = set()
        """Agents whose last use is not written down yet."""
        self.quarantine_bytes = 0
        self.aside_bytes = 0
        """Of damaged or replaced indexes that were kept, and of block files that no agent references."""
        self.manifest_bytes = 0
        """Of all manifests on disk, and of those that are still to be written."""
        self.manifest_sizes: dict[AgentKey, int] = {}
        self.reads, self.writes = InFlight(), InFlight()
        self._last_steps: WeakValueDictionary[AgentKey, asyncio.Lock] = WeakValueDictionary()
        self._readers = ThreadPoolExecutor(tuning.io_threads, thread_name_prefix="kv-read")
        self._writers = ThreadPoolExecutor(tuning.io_threads, thread_name_prefix="kv-write")

    def info(self, node: Node, kind: PartKind) -> BlockInfo:
        return block_info(node, kind)

    def manifest_path(self, key: AgentKey) -> Path:
        return self.settings.data_dir / FOLDER / file_name(*key)

    def root(self, tenant: str) -> bytes:
        return root_id(tenant, self.fingerprint)

    def has(self, node: Node, kind: PartKind) -> bool:
        return kind in node.parts or self.hot.has(node, kind)

    async def reading(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that reads files, beside the event loop."""
        run = partial(self.reads.run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def writing(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that changes files, beside the event loop. Reads don't wait behind it."""
        run = partial(self.writes.run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._writers, run)

    @property
    def disk_bytes(self) -> int:
        """Everything that the store has under the data directory."""
        blocks = self.accounts.block_bytes + self.accounts.going_bytes
        others = self.quarantine_bytes + self.manifest_bytes + self.aside_bytes
        return blocks + others + self.journal.database.disk_bytes + self.journal.commits.nbytes

    def shutdown(self) -> None:
        self._readers.shutdown()
        self._writers.shutdown()

    # Agents as others see them

    def existing(self, tenant: str, agent_id: str) -> Agent:
        """
        Raises:
            AgentNotFound
        """
        agent = self.index.agents.get(AgentKey(tenant, agent_id))
        if agent is None:
            raise AgentNotFound(f"there is no agent {agent_id!r}", agent_id=agent_id)
        return agent

    @contextlib.asynccontextmanager
    async def last_step(self, key: AgentKey) -> AsyncIterator[None]:
        """Be the only one that changes an agent during the block: it has the transaction, and the index behind it.

        What the index says of agents is what the journal has of them, or, where the disk refuses, what was acknowledged
        as such: nobody sees what may yet be lost.
        """
        lock = self._last_steps.get(key)
        if lock is None:
            lock = self._last_steps[key] = asyncio.Lock()
        async with lock:
            yield

    def record(self, agent: Agent) -> AgentRecord:
        last_used = self.clock.shown(agent.last_used)
        ours = agent.fingerprint == self.fingerprint
        return AgentRecord(
            tenant=agent.tenant,
            agent_id=agent.agent_id,
            incarnation=agent.incarnation,
            revision=agent.revision,
            token_count=len(agent.tokens),
            tier=Tier.WARM if agent.cold_parts else Tier.HOT,
            hot_bytes=agent.hot_bytes,
            warm_bytes=agent.warm_bytes,
            shared_bytes=agent.shared_bytes,
            pinned=agent.pinned,
            ttl=agent.ttl,
            labels=agent.labels,
            create_time=self.clock.shown(agent.create_time),
            update_time=self.clock.shown(agent.update_time),
            last_used_time=last_used,
            expire_time=None if agent.ttl is None else min(last_used + agent.ttl, LATEST),
            parent_agent_id=agent.parent_agent_id,
            ending=agent.ending,
            durable=agent.durable,
            fingerprint_ok=ours,
            fingerprint_differences=() if ours else self.foreign.differences(agent.fingerprint),
        )


def node_of(name: str) -> bytes:
    """The id of the node whose object this is, or was."""
    return bytes.fromhex(name.partition(".")[0])
