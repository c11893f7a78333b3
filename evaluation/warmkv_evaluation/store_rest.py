"""Bytes that a context takes while nobody works on it, in RAM and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from warmkv_evaluation.store_contexts import TENANT, block_files, extend, opened, tokens_of
from warmkv_evaluation.store_shapes import Shape
from warmkv_server.contract.kv import PartKind
from warmkv_server.kv.store import Durability

AGENT = "resting"


@dataclass(frozen=True)
class Rest:
    """One agent after a prime and a turn.

    Attributes:
        window: tokens that windowed layers look back on; 0 without such layers.
        ram_bytes, disk_bytes: of the agent as the store counts them, headers included.
        file_bytes: all block files in the folder.
        append_file_bytes: those of the layers that keep every token.
        append_fp16_bytes: the same keys and values in 16 bits each.
        fp16_bytes: those of all layers, each windowed one with exactly its window.
        state_bytes: one snapshot of recurrent layers. It isn't quantised, doesn't grow, and counts nowhere above.
    """

    shape: str
    group_size: int
    tokens: int
    window: int
    ram_bytes: int
    disk_bytes: int
    file_bytes: int
    append_file_bytes: int
    append_fp16_bytes: int
    fp16_bytes: int
    state_bytes: int


async def rest(shape: Shape, data_dir: Path, *, tokens: int, turn: int) -> Rest:
    """Commit a context of `tokens` tokens, the last `turn` of them in a turn of their own."""
    layout = shape.cache_map.layout
    rng = np.random.default_rng(0)
    context = tokens_of(tokens)
    async with opened(data_dir, layout, durability=Durability.NONE) as store:
        for end in (tokens - turn, tokens):
            await extend(store, layout, AGENT, context[:end], rng)
        await store.settled()
        agent = store.agent(TENANT, AGENT)
        assert agent is not None
        sizes = block_files(data_dir)
        kept = sum(size for path, size in sizes.items() if f".{PartKind.APPEND}." in path.name)
    stacks = shape.cache_map.stacks
    values = sum(len(s.streams) * s.heads * s.head_dim for s in stacks if s.kind == PartKind.APPEND)
    return Rest(
        shape=shape.name,
        group_size=shape.group_size,
        tokens=tokens,
        window=layout.window,
        ram_bytes=agent.hot_bytes,
        disk_bytes=agent.warm_bytes,
        file_bytes=sum(sizes.values()),
        append_file_bytes=kept,
        append_fp16_bytes=2 * values * tokens,
        fp16_bytes=shape.fp16_bytes(tokens),
        state_bytes=layout.nbytes(PartKind.STATE),
    )
