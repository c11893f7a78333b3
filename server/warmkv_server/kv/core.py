"""What the parts of the store share: the index, the tiers, the files, and the counters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from warmkv_server.errors import AgentNotFound
from warmkv_server.kv import blockfile
from warmkv_server.kv.blockfile import BlockInfo
from warmkv_server.kv.boundaries import in_window
from warmkv_server.kv.disk_state import DiskState
from warmkv_server.kv.files import Files
from warmkv_server.kv.hot import HotTier
from warmkv_server.kv.ids import root_id
from warmkv_server.kv.index import Agent, AgentKey, Index, Node
from warmkv_server.kv.journal import Journal
from warmkv_server.kv.manifest import FOLDER, file_name
from warmkv_server.kv.records import AgentRecord, RequestOutcome, StoreSettings, Tier
from warmkv_server.kv.types import KVLayout, PartKind, TensorSpec

BLOCKS = "blocks"
QUARANTINE = "quarantine"

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


@dataclass
class KeptOutcome:
    """
    Attributes:
        time: of the commit, in seconds since 1970.
        owed_by: the agent whose commit it belongs to, if the journal has neither.
    """

    outcome: RequestOutcome
    time: float
    owed_by: Agent | None = None


class Core:
    """Used on the event loop's thread only, but for `path` and `info`."""

    def __init__(
        self, settings: StoreSettings, layout: KVLayout, fingerprint: str, index: Index, journal: Journal, files: Files
    ) -> None:
        self.settings = settings
        self.layout = layout
        self.fingerprint = fingerprint
        self.index = index
        self.journal = journal
        self.files = files
        self.hot = HotTier(settings.hot_bytes, may_evict=lambda node: not node.pinned_refs)
        self.specs: dict[PartKind, tuple[TensorSpec, ...]] = {
            kind: blockfile.ordered(layout.of_kind(kind)) for kind in PartKind
        }
        self.counters = Counters()
        self.disk = DiskState()
        self.used: set[Agent] = set()
        """Agents whose last use is not written down yet."""
        self.was_hot: set[Agent] = set()
        """Agents that were in RAM when they were last used or looked at."""
        self.outcomes: dict[AgentKey, KeptOutcome] = {}
        self.block_bytes = 0
        """Of all block files that the index knows."""
        self.quarantine_bytes = 0
        self.aside_bytes = 0
        """Of damaged or replaced indexes that were kept, and of block files that no agent references."""
        self.manifest_bytes = 0
        """Of all manifests on disk, and of those that are still to be written."""
        self.manifest_sizes: dict[AgentKey, int] = {}
        self._readers = ThreadPoolExecutor(settings.io_threads, thread_name_prefix="kv-read")
        self._writers = ThreadPoolExecutor(settings.io_threads, thread_name_prefix="kv-write")

    def path(self, node: Node, kind: PartKind) -> Path:
        return block_path(self.settings.data_dir, node.id.hex(), kind)

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
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: work(*args, **kwargs))

    async def writing(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that changes files, beside the event loop. Reads don't wait behind it."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, lambda: work(*args, **kwargs))

    @property
    def disk_bytes(self) -> int:
        """Everything that the store has under the data directory."""
        files = self.block_bytes + self.quarantine_bytes + self.manifest_bytes + self.aside_bytes
        return files + self.journal.database.disk_bytes + self.journal.commits.nbytes

    def shutdown(self) -> None:
        self._readers.shutdown()
        self._writers.shutdown()

    # Agents as others see them

    def existing(self, tenant: str, agent_id: str) -> Agent:
        """
        Raises:
            AgentNotFound
        """
        agent = self.index.agents.get((tenant, agent_id))
        if agent is None:
            raise AgentNotFound(f"there is no agent {agent_id!r}")
        return agent

    def tier(self, agent: Agent) -> Tier:
        """HOT if the next request can go on from the head without reading a file."""
        head = len(agent.tokens)
        needed = [(node, PartKind.APPEND) for node in agent.nodes]
        needed += [(node, PartKind.WINDOW) for node in in_window(agent.nodes, head, self.layout.window)]
        if head in agent.snapshots:
            needed.append((agent.snapshots[head], PartKind.STATE))
        ours = agent.fingerprint == self.fingerprint
        hot = ours and all(self.hot.has(node, kind) for node, kind in needed if self.specs[kind])
        return Tier.HOT if hot else Tier.WARM

    def record(self, agent: Agent) -> AgentRecord:
        nodes = list(agent.all_nodes())
        return AgentRecord(
            tenant=agent.tenant,
            agent_id=agent.agent_id,
            incarnation=agent.incarnation,
            revision=agent.revision,
            token_count=len(agent.tokens),
            tier=self.tier(agent),
            hot_bytes=sum(self.hot.bytes_of(node) for node in nodes),
            warm_bytes=sum(node.disk_bytes for node in nodes),
            shared_bytes=sum(node.disk_bytes for node in nodes if node.refs > 1),
            pinned=agent.pinned,
            ttl=agent.ttl,
            labels=dict(agent.labels),
            create_time=agent.create_time,
            update_time=agent.update_time,
            last_used_time=agent.last_used,
            expire_time=agent.expires,
            parent_agent_id=agent.parent_agent_id,
            ending=agent.ending,
            durable=agent.durable,
            fingerprint_ok=agent.fingerprint == self.fingerprint,
        )


def block_path(data_dir: Path, node: str, kind: PartKind) -> Path:
    """Where a node's file is; `node` in hex. Spread over 256 folders."""
    return data_dir.joinpath(BLOCKS, node[:2], blockfile.file_name(node, kind))


def block_info(node: Node, kind: PartKind) -> BlockInfo:
    """What the header of a node's file has to say."""
    return BlockInfo(
        kind, node.id.hex(), node.parent.hex(), node.start, node.block_tokens, node.fingerprint, node.tenant
    )
