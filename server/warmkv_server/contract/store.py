"""What the store says of agents and of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that ask a server have to start at once
    import numpy as np
    from numpy.typing import NDArray


class Durability(StrEnum):
    """How hard a commit pushes its files to the medium before it counts as persisted."""

    FULL = "full"
    """fsync, and F_FULLFSYNC where the system has it (macOS), which also empties the drive's own cache."""
    FSYNC = "fsync"
    """fsync. On macOS this leaves the drive's cache alone: kill -9 is survived, a power cut perhaps not."""
    NONE = "none"
    """No sync at all: a restart of the process is survived, a crash of the machine perhaps not."""


class Tier(StrEnum):
    HOT = "hot"
    """All KV of the context is in RAM."""
    WARM = "warm"
    """Some of it has to be read from disk."""


@dataclass(frozen=True)
class AgentRecord:
    """One agent as of its last commit.

    Attributes:
        incarnation: never used twice, so that what was begun on a deleted agent can't land on its successor.
        hot_bytes: RAM its blocks take, shared ones included.
        warm_bytes: block files it references, headers included.
        shared_bytes: the part of warm_bytes that other agents reference too.
        ttl: seconds after the last use; None for ever.
        create_time, update_time, last_used_time, expire_time: seconds since 1970.
        ending: what the engine said about how the context ends; opaque here.
        durable: the last commit is on disk.
        fingerprint_ok: its KV belongs to the loaded model.
        fingerprint_differences: if not, how what it belongs to differs, such as "kv_bits: 4 -> 8".
    """

    tenant: str
    agent_id: str
    incarnation: int
    revision: int
    token_count: int
    tier: Tier
    hot_bytes: int
    warm_bytes: int
    shared_bytes: int
    pinned: bool
    ttl: float | None
    labels: Mapping[str, str]
    create_time: float
    update_time: float
    last_used_time: float
    expire_time: float | None
    parent_agent_id: str
    ending: str
    durable: bool
    fingerprint_ok: bool
    fingerprint_differences: tuple[str, ...] = ()

    @classmethod
    def unmade(cls, tenant: str, agent_id: str) -> AgentRecord:
        """What there is to say of an agent before its first commit. It has no times yet: they are 0."""
        return cls(
            tenant,
            agent_id,
            incarnation=0,
            revision=0,
            token_count=0,
            tier=Tier.HOT,
            hot_bytes=0,
            warm_bytes=0,
            shared_bytes=0,
            pinned=False,
            ttl=None,
            labels={},
            create_time=0.0,
            update_time=0.0,
            last_used_time=0.0,
            expire_time=None,
            parent_agent_id="",
            ending="",
            durable=True,
            fingerprint_ok=True,
        )


@dataclass(frozen=True)
class StoreStats:
    """Counters since the store was opened, and gauges of this moment. Bytes unless named otherwise."""

    bytes_loaded: int = 0
    kv_bytes_written: int = 0
    metadata_bytes_written: int = 0
    evictions: int = 0
    """Agents that left RAM, by the budget or by hand."""
    quarantined: int = 0
    """Files."""
    commits_failed: int = 0
    """Commits that the disk refused."""
    hot_bytes: int = 0
    disk_bytes: int = 0
    outcome_bytes: int = 0
    """RAM that outcomes of requests take."""
    agents_by_tier: Mapping[str, int] = field(default_factory=dict)
    not_durable: int = 0
    """Agents whose last commit is in RAM only. Above 0 the disk is refusing writes."""
    stale_agents: int = 0
    """Agents whose KV belongs to another model or other KV settings."""
    hidden_agents: int = 0
    """Contexts of requests without an agent. They are not among the agents above."""
    hidden_bytes: int = 0
    """That these alone take on disk and in the index."""


@dataclass(frozen=True)
class HeldSnapshot:
    """All contexts of a tenant whose KV is at hand, by a number that is never used for another; nothing else is.

    Attributes:
        contexts: the tokens of each, shape (tokens,), read-only.
    """

    contexts: Mapping[int, NDArray[np.int32]]


@dataclass(frozen=True)
class HeldChange:
    """One of them has changed: it has come, has grown, was cut or replaced, or is gone.

    Attributes:
        before, after: its tokens, shape (tokens,), read-only; none where it wasn't there, or isn't any more.
    """

    context: int
    before: NDArray[np.int32]
    after: NDArray[np.int32]
