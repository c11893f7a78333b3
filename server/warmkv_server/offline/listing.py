"""`warmkv store ls`: what a data directory holds, and whose it is."""

from __future__ import annotations

import contextlib
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from warmkv_server.kv.blocks.disk import QUARANTINE
from warmkv_server.kv.blocks.files import entries
from warmkv_server.kv.catalog.clock import Clock
from warmkv_server.kv.catalog.database import INDEX_FILE
from warmkv_server.kv.catalog.manifest import FOLDER, SUFFIX
from warmkv_server.kv.catalog.rebuild import aside_files
from warmkv_server.kv.index.index import Agent
from warmkv_server.offline.directory import View, disk_bytes, usable_tokens


@dataclass(frozen=True)
class AgentLine:
    """One agent as of its last commit.

    Attributes:
        usable_tokens: how many of its tokens, from the first, have files; the rest is computed anew.
        disk_bytes: block files that it references, headers included.
        shared_bytes: the part of those that other agents reference too.
        ttl: seconds after the last use; None for ever.
        last_used: seconds since 1970.
        fingerprint: digest of the model and settings that its KV belongs to.
    """

    tenant: str
    agent_id: str
    tokens: int
    usable_tokens: int
    revision: int
    disk_bytes: int
    shared_bytes: int
    pinned: bool
    ttl: float | None
    last_used: float
    fingerprint: str


@dataclass(frozen=True)
class ModelLine:
    """What belongs to one model with its settings. `fields` is what the fingerprint was made of."""

    fingerprint: str
    fields: dict[str, str]
    agents: int
    files: int
    disk_bytes: int


@dataclass(frozen=True)
class Listing:
    """A data directory; bytes unless named otherwise.

    Attributes:
        hidden_agents, hidden_bytes: contexts of requests without an agent, which are not among the agents, and what the
            block files take that they alone reference.
        manifest_files: one for each agent, or fewer for a moment after commits.
        aside_bytes: of damaged or replaced indexes that were kept.
    """

    data_dir: str
    agents: list[AgentLine]
    hidden_agents: int
    hidden_bytes: int
    models: list[ModelLine]
    block_files: int
    block_bytes: int
    unreferenced_bytes: int
    quarantine_files: int
    quarantine_bytes: int
    manifest_files: int
    manifest_bytes: int
    index_bytes: int
    aside_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def listing(view: View) -> Listing:
    """Agents by tenant and id; models by bytes, the largest first."""
    nodes = view.index.nodes.values()
    quarantined = _sizes(Path(e.path) for e in entries(view.data_dir / QUARANTINE))
    manifests = _sizes(Path(e.path) for e in entries(view.data_dir / FOLDER) if e.name.endswith(SUFFIX))
    aside = _sizes(aside_files(view.data_dir))
    index = _sizes(Path(e.path) for e in entries(view.data_dir) if e.name.startswith(INDEX_FILE))
    return Listing(
        data_dir=str(view.data_dir),
        agents=[_agent(agent, view.clock) for _, agent in sorted(view.index.agents.items()) if not agent.hidden],
        hidden_agents=len(view.index.hidden),
        hidden_bytes=disk_bytes(node for node in nodes if node.hidden),
        models=_models(view),
        block_files=sum(len(node.parts) for node in nodes),
        block_bytes=disk_bytes(nodes),
        unreferenced_bytes=disk_bytes(node for node in nodes if not node.refs),
        quarantine_files=len(quarantined),
        quarantine_bytes=sum(quarantined),
        manifest_files=len(manifests),
        manifest_bytes=sum(manifests),
        index_bytes=sum(index) - sum(aside),
        aside_bytes=sum(aside),
    )


def _agent(agent: Agent, clock: Clock) -> AgentLine:
    nodes = list(agent.all_nodes())
    return AgentLine(
        tenant=agent.tenant,
        agent_id=agent.agent_id,
        tokens=len(agent.tokens),
        usable_tokens=usable_tokens(agent),
        revision=agent.revision,
        disk_bytes=disk_bytes(nodes),
        shared_bytes=disk_bytes(node for node in nodes if node.refs > 1),
        pinned=agent.pinned,
        ttl=agent.ttl,
        last_used=clock.shown(agent.last_used),
        fingerprint=agent.fingerprint,
    )


def _models(view: View) -> list[ModelLine]:
    agents = Counter(agent.fingerprint for agent in view.index.agents.values() if not agent.hidden)
    files: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for node in view.index.nodes.values():
        files[node.fingerprint] += len(node.parts)
        size[node.fingerprint] += node.disk_bytes
    digests = sorted({*view.fingerprints, *agents, *files}, key=lambda digest: (-size[digest], digest))
    return [
        ModelLine(
            digest,
            dict(view.fingerprints[digest].fields) if digest in view.fingerprints else {},
            agents[digest],
            files[digest],
            size[digest],
        )
        for digest in digests
    ]


def _sizes(paths: Iterable[Path]) -> list[int]:
    """Of the plain files among these; beside a running server some may go meanwhile."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found.append(status.st_size)
    return found
