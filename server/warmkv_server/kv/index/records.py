"""What the store is told and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import NDArray

from warmkv_server.contract.kv import Growth, Reuse
from warmkv_server.contract.store import AgentRecord
from warmkv_server.kv.blocks.blockfile import VERSION

if TYPE_CHECKING:
    from warmkv_server.kv.index.prefix import Lease

TokenIds = NDArray[np.int32]
"""Token ids of a context, shape (tokens,)."""


_QUARANTINE_SHARE = 8
_NOT_IN_VERSION_1 = {"implementation"}
"""Fields that a fingerprint of version 1 had not."""


@dataclass(frozen=True)
class Tuning:
    """What no operator sets.

    Attributes:
        io_threads: files read or written at once. Each keeps memory for reading into, at most 40 MiB, and none after a
            rest.
        quarantine_bytes: bad files kept for inspection; the oldest go first.
        retry_seconds: pause between attempts to write what the disk refused.
        outcome_seconds: how long the outcome of a request id is kept.
        outcome_bytes: RAM that outcomes may take; older ones are in the index alone.
        manifest_seconds: pause between writing manifests; what commits meanwhile is written together.
    """

    io_threads: int = 4
    quarantine_bytes: int = 1 << 30
    retry_seconds: float = 5.0
    outcome_seconds: float = 3600.0
    outcome_bytes: int = 32 << 20
    manifest_seconds: float = 1.0

    def quarantine_limit(self, disk_bytes: int) -> int:
        """Bytes. Bad files count in the quota, and must not take the room of good ones.

        Args:
            disk_bytes: the quota; 0 for none.
        """
        return min(self.quarantine_bytes, disk_bytes // _QUARANTINE_SHARE or self.quarantine_bytes)


@dataclass(frozen=True)
class Fingerprint:
    """Everything that the bytes of a KV cache depend on besides the tokens. Two that differ share nothing.

    Attributes:
        known_as: its digest in a directory that knows it by an older one; else empty.
    """

    fields: Mapping[str, str]
    known_as: str = ""

    @classmethod
    def of_model(cls, fields: Mapping[str, str]) -> Self:
        """What a loaded model says of itself, and the format in which its KV is kept."""
        return cls({**fields, "block_format": str(VERSION)})

    @property
    def digest(self) -> str:
        """32 hex digits."""
        if self.known_as:
            return self.known_as
        hasher = blake2b(digest_size=16, person=b"warmkv-fp")
        for name, value in sorted(self.fields.items()):
            for text in (name.encode(), value.encode()):
                hasher.update(len(text).to_bytes(8, "little") + text)
        return hasher.hexdigest()

    def in_version_1(self) -> Fingerprint:
        """What a directory of version 1 would call it: its fingerprint covered less."""
        fields = {name: value for name, value in self.fields.items() if name not in _NOT_IN_VERSION_1}
        return Fingerprint({**fields, "block_format": "1"} if "block_format" in fields else fields)

    def as_known(self, known: Mapping[str, Fingerprint], *, of_old: Container[str] = ()) -> Fingerprint:
        """The same, under the digest that a directory knows it by, if it does.

        One of version 1 is taken for it where everything that it covered is the same: it is known as that from then on,
        and not any more to a model that differs in what version 1 did not cover.

        Args:
            known: by digest.
            of_old: digests of version 1 of which nobody has the fields any more.
        """
        for digest, each in known.items():
            if each.fields == self.fields:
                return Fingerprint(self.fields, digest)
        before = self.in_version_1()
        there = known.get(before.digest)
        if (there is None and before.digest in of_old) or (there is not None and there.fields == before.fields):
            return Fingerprint(self.fields, before.digest)
        return self

    def differing(self, other: Fingerprint) -> tuple[str, ...]:
        """Names of the fields that differ, sorted."""
        names = self.fields.keys() | other.fields.keys()
        return tuple(sorted(n for n in names if self.fields.get(n) != other.fields.get(n)))


@dataclass(frozen=True)
class RequestOutcome:
    """What a finished request answered, kept under its id so that a retry gets the same. `payload` is opaque here."""

    request_id: str
    body_hash: bytes
    payload: bytes


class Unset:
    """The type of UNSET: leave the value as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()

OutcomeOf = Callable[[AgentRecord, bool], RequestOutcome]
"""Makes the outcome from the agent as committed and from whether the commit is durable."""


@dataclass(frozen=True)
class Commit:
    """A new context for an agent.

    Attributes:
        incarnation: of the agent that the request worked on; None if it must not exist yet.
        tokens: the whole new context.
        reuse: what `Store.load` gave; its spans hold the words that merging and cutting copy.
        growth: KV of tokens [reuse.length, len(tokens)); None if that is nothing.
        lease: the one that was loaded. The caller releases it afterwards.
        keep_boundaries: lengths of the context at which windows and snapshots are kept beyond the next commits.
        pinned, ttl, labels: UNSET leaves them as they are.
        request: stored in the same transaction; a function of the resulting agent where the answer contains it.
    """

    tenant: str
    agent_id: str
    incarnation: int | None
    tokens: TokenIds
    reuse: Reuse
    growth: Growth | None
    lease: Lease
    ending: str = ""
    keep_boundaries: frozenset[int] = frozenset()
    pinned: bool | Unset = UNSET
    ttl: float | Unset | None = UNSET
    labels: Mapping[str, str] | Unset = UNSET
    request: RequestOutcome | OutcomeOf | None = None


@dataclass(frozen=True)
class Committed:
    """
    Attributes:
        persisted: the context survives kill -9 and, as far as the durability level says, power loss. False: the disk
            refused, RAM holds the only copy, and writing is retried in the background.
        seconds: from the call to the end of the transaction.
        bytes_written: block files of this commit.
    """

    agent: AgentRecord
    persisted: bool
    seconds: float
    bytes_written: int


@dataclass(frozen=True)
class Evicted:
    """
    Attributes:
        bytes_freed: RAM.
        resident_before, resident_after: bytes of the agent's files in the OS page cache; -1 where it can't be known.
    """

    agent: AgentRecord
    bytes_freed: int
    resident_before: int
    resident_after: int
