"""The store's face: what agents and the service call.

All state that decides anything lives on the event loop's thread in plain dicts. What blocks runs elsewhere: one thread
for SQLite, a few for files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

from warmkv_server.kv.lease import Lease
from warmkv_server.kv.records import (
    UNSET,
    AgentRecord,
    Commit,
    Committed,
    Durability,
    Evicted,
    Fingerprint,
    RequestOutcome,
    StoreSettings,
    StoreStats,
    Tier,
    TokenIds,
    Unset,
)
from warmkv_server.kv.types import KVLayout, Reuse

__all__ = [
    "UNSET",
    "AgentRecord",
    "Commit",
    "Committed",
    "Durability",
    "Evicted",
    "Fingerprint",
    "Lease",
    "RequestOutcome",
    "Store",
    "StoreSettings",
    "StoreStats",
    "Tier",
    "TokenIds",
    "Unset",
]


class Store:
    """The contexts of all agents. Make one with `Store.open`; all methods are called on the event loop's thread."""

    @classmethod
    async def open(cls, settings: StoreSettings, layout: KVLayout, fingerprint: Fingerprint) -> Self:
        """Lock the directory, read the index, sweep what a crash left behind.

        Raises:
            OperatorError: the directory is in use, can't be written, or was written by a newer version.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Wait for what is in flight, then let go of the directory."""
        raise NotImplementedError

    def agent(self, tenant: str, agent_id: str) -> AgentRecord | None:
        raise NotImplementedError

    def agents(self, tenant: str, after: str = "") -> Iterator[AgentRecord]:
        """A tenant's agents by agent_id, from the first one behind `after`."""
        raise NotImplementedError

    def tokens(self, tenant: str, agent_id: str) -> TokenIds:
        """The committed context, read-only.

        Raises:
            AgentNotFound
        """
        raise NotImplementedError

    def resolve(self, tenant: str, agent_id: str, tokens: TokenIds, limit: int) -> Lease:
        """Find the longest prefix of tokens[:limit] whose KV the store has; from memory, at once.

        Args:
            agent_id: "" for a request without an agent: only other agents' blocks are found.
            limit: at most so many tokens; one less than all when an answer is to be sampled.
        """
        raise NotImplementedError

    async def load(self, lease: Lease) -> Reuse:
        """Bring a lease's KV into RAM, each file verified before it is used.

        A bad, missing or slow file shortens the result, which then says why; it never raises for one.
        """
        raise NotImplementedError

    async def commit(self, commit: Commit) -> Committed:
        """Make `commit.tokens` the agent's context: files first, then one transaction.

        A disk that refuses (full, read-only, broken) doesn't fail the commit: see `Committed.persisted`. Cancelling the
        caller doesn't stop a commit that has begun.

        Raises:
            AgentDeleted: the incarnation is gone. Nothing is kept.
            AgentExists: the incarnation is None and the agent exists.
        """
        raise NotImplementedError

    async def fork(
        self, tenant: str, source_id: str, target_id: str, request: RequestOutcome | None = None
    ) -> AgentRecord:
        """A new agent with the source's committed context. Copies a list of node ids, no KV.

        Raises:
            AgentNotFound, AgentExists, StorageUnavailable
        """
        raise NotImplementedError

    async def update(
        self,
        tenant: str,
        agent_id: str,
        *,
        pinned: bool | Unset = UNSET,
        ttl: float | None | Unset = UNSET,
        labels: Mapping[str, str] | Unset = UNSET,
    ) -> AgentRecord:
        """Change what is not KV. Durable before it returns.

        Raises:
            AgentNotFound, StorageUnavailable
        """
        raise NotImplementedError

    async def evict(self, tenant: str, agent_id: str, drop_page_cache: bool = False) -> Evicted:
        """Drop the RAM copy of the agent's nodes, also where others share them.

        Raises:
            AgentNotFound
            NotDurable: RAM holds the only copy.
        """
        raise NotImplementedError

    async def delete(self, tenant: str, agent_id: str) -> bool:
        """Remove an agent, durably, without reading any of its files. False if there was none.

        Raises:
            StorageUnavailable: the disk doesn't take the deletion; the agent is still there.
        """
        raise NotImplementedError

    def outcome(self, tenant: str, request_id: str) -> RequestOutcome | None:
        """What the request of this id answered, if it is still kept."""
        raise NotImplementedError

    def stats(self) -> StoreStats:
        raise NotImplementedError
