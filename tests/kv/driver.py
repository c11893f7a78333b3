"""Working the store as the server does: resolve, load, compute what is lacking, commit."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.kv import words
from warmkv_server.contract.fairness import Tenants
from warmkv_server.contract.kv import KVLayout, Reuse
from warmkv_server.contract.settings import Settings
from warmkv_server.kv.store import (
    Commit,
    Committed,
    Durability,
    Fingerprint,
    Store,
    TokenIds,
    Tuning,
)

TENANT = "t"
FINGERPRINT = Fingerprint({"weights": "w1", "kv_bits": "4"})
OTHER_MODEL = Fingerprint({"weights": "w2", "kv_bits": "4"})


_SET = {field.name for field in dataclasses.fields(Settings)}
_TUNABLE = {field.name for field in dataclasses.fields(Tuning)}


async def open_store(
    data_dir: Path, layout: KVLayout, fingerprint: Fingerprint = FINGERPRINT, tenants: int = 1, **changes: Any
) -> Store:
    """A small store that does all at once.

    Args:
        changes: of settings, of what is tuned, or of what else a store is opened with.
    """
    chosen: dict[str, Any] = {
        "data_dir": data_dir,
        "hot_bytes": 64 << 20,
        "durability": Durability.NONE,
        "headroom_bytes": 0,
    }
    chosen |= {name: changes.pop(name) for name in _SET & changes.keys()}
    tuned = {"retry_seconds": 0.05, **{name: changes.pop(name) for name in _TUNABLE & changes.keys()}}
    settings, tuning = Settings(**chosen), Tuning(**tuned)
    return await Store.open(settings, layout, fingerprint, tuning=tuning, tenants=Tenants(tenants), **changes)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for something that the store does by itself, in its own time."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for: nobody but tests ever does
            await asyncio.sleep(0.01)


class Driver:
    """One tenant's agents on one store."""

    def __init__(self, store: Store, layout: KVLayout, tenant: str = TENANT) -> None:
        self.store = store
        self.layout = layout
        self.tenant = tenant

    @classmethod
    async def open(
        cls,
        data_dir: Path,
        layout: KVLayout = words.LAYOUTS["append"],
        fingerprint: Fingerprint = FINGERPRINT,
        **changes: Any,
    ) -> Driver:
        return cls(await open_store(data_dir, layout, fingerprint, **changes), layout)

    async def close(self) -> None:
        await self.store.close()

    async def reuse(self, agent_id: str, tokens: TokenIds, limit: int | None = None, extra_key: bytes = b"") -> Reuse:
        """What a request for these tokens would get; every word of it checked."""
        limit = len(tokens) if limit is None else limit
        with self.store.resolve(self.tenant, agent_id, tokens, limit, extra_key) as lease:
            promised = lease.length
            reuse = await self.store.load(lease)
            assert reuse.length <= promised <= limit
            words.check(self.layout, tokens, reuse)
            return reuse

    async def put(
        self,
        agent_id: str,
        tokens: TokenIds,
        *,
        keep: Iterable[int] = (),
        answer: bool = False,
        extra_key: bytes = b"",
        kept_as: str = "",
        **changes: Any,
    ) -> tuple[Reuse, Committed]:
        """Make these tokens the agent's context, computing what the store doesn't have.

        Args:
            kept_as: the agent that it becomes, where that is another one than asks.
        """
        kept_as = kept_as or agent_id
        limit = len(tokens) - 1 if answer else len(tokens)
        keep = frozenset(keep)
        with self.store.resolve(self.tenant, agent_id, tokens, limit, extra_key) as lease:
            reuse = await self.store.load(lease)
            words.check(self.layout, tokens, reuse)
            growth = words.grow(self.layout, tokens, reuse.length, sorted(keep))
            committed = await self.store.commit(
                Commit(
                    tenant=self.tenant,
                    agent_id=kept_as,
                    incarnation=lease.incarnation,
                    tokens=tokens,
                    reuse=reuse,
                    growth=growth,
                    lease=lease,
                    keep_boundaries=keep,
                    **changes,
                )
            )
        assert committed.agent.token_count == len(tokens)
        assert np.array_equal(self.store.tokens(self.tenant, kept_as), tokens)
        return reuse, committed
