"""Contexts in a real store whose KV is noise: as large as a model's, computed by none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from warmkv_server.contract.kv import Growth, KVLayout, PartKind, policy_of
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.arrays import stored_shape
from warmkv_server.kv.store import Commit, Committed, Durability, Fingerprint, Store, TokenIds

TENANT = "measured"
HOT_BYTES = 1 << 40  # nothing is evicted unless a measurement asks for it

Noise = np.random.Generator


@asynccontextmanager
async def opened(
    data_dir: Path,
    layout: KVLayout,
    *,
    hot_bytes: int = HOT_BYTES,
    durability: Durability = Durability.FULL,
    busy: Callable[[], bool] = lambda: False,
) -> AsyncIterator[Store]:
    """A store of its own in an empty folder, as durable as a server's unless told otherwise."""
    settings = Settings(data_dir=data_dir, hot_bytes=hot_bytes, durability=durability)
    store = await Store.open(settings, layout, Fingerprint({"contents": "noise"}), busy=busy)
    try:
        yield store
    finally:
        await store.close()


def tokens_of(count: int, seed: int = 0) -> TokenIds:
    """Token ids of a context; contexts of different seeds share no block."""
    return np.random.default_rng((seed, 1)).integers(0, 32_000, count, dtype=np.int32)


def noise(layout: KVLayout, start: int, count: int, rng: Noise) -> Growth:
    """KV of tokens [start, start + count): as hard to compress as quantised words, and as large."""
    tensors: dict[PartKind, dict[str, mx.array]] = {}
    for spec in layout.tensors:
        if not policy_of(spec.kind).snapshot:
            dtype = np.dtype(spec.dtype)
            shape = stored_shape(spec, count)
            words = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
            tensors.setdefault(spec.kind, {})[spec.name] = mx.array(words)
    mx.eval([list(family.values()) for family in tensors.values()])
    return Growth(start, count, dict(tensors))


async def extend(store: Store, layout: KVLayout, agent_id: str, tokens: TokenIds, rng: Noise) -> Committed:
    """One turn: reuse what the agent has of `tokens`, make up the rest, commit.

    Raises:
        OperatorError: the disk refused.
    """
    with store.resolve(TENANT, agent_id, tokens, len(tokens)) as lease:
        reuse = await store.load(lease)
        growth = noise(layout, reuse.length, len(tokens) - reuse.length, rng)
        committed = await store.commit(Commit(TENANT, agent_id, lease.incarnation, tokens, reuse, growth, lease))
    if not committed.persisted:
        raise OperatorError("the disk refused a commit; measure where there is room: --data-dir")
    return committed


def block_files(data_dir: Path) -> dict[Path, int]:
    """Every block file with its size, in bytes, in the order of their names."""
    return {path: path.stat().st_size for path in sorted(data_dir.rglob("*.safetensors"))}
