"""How fast a context comes from disk into RAM, against reading the same files and doing nothing with them.

A load reads, verifies and builds: it ends with an evaluated array for every tensor of every block. It is measured while
RAM is full of another context, which makes room bit by bit, as in a server that has run for a while; and once more
into room, where memory for most of the arrays has to be cleared first. The plain read is one `readv` a file, by as many
threads, and differs in where the bytes go:

* kept: into memory that was touched before, of its own for each file. What a loader with free memory at hand would do.
* fresh: into memory that is new to the process, so that the system clears every page of it first.
* reused: each thread reads all its files into one buffer, which the processor's cache holds. No loader can: the bytes
  of the file before are gone.

Between a plain read and a load, for where the time goes (see `Readers`): kept with every piece hashed, and the
store's reader alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from warmkv_evaluation.store_contexts import TENANT, block_files, extend, opened, tokens_of
from warmkv_evaluation.store_readers import HASHED, PLAIN, READER, Readers
from warmkv_evaluation.store_shapes import Shape
from warmkv_server.contract.kv import PartKind, Reuse
from warmkv_server.engine.cache.caches import empty_caches
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.store import Store, TokenIds, Tuning

AGENT, OTHER = "loaded", "other"
PRIMED_AT_ONCE = 4096
JOIN_ROOM = 64
JOIN_MARGIN = 1.25
"""Of the memory that joining takes, for what else the system needs meanwhile."""

LOAD, ROOM = "load", "room"
NAMES = {
    LOAD: "load",
    ROOM: "load into room",
    READER: "reader alone",
    HASHED: "plain read, kept and hashed",
    **{way: f"plain read, {way}" for way in PLAIN},
}
WAYS = tuple(NAMES)


@dataclass(frozen=True)
class LoadTimes:
    """Samples in seconds, the n-th of each way taken one after another.

    Attributes:
        dropped: the files were out of the page cache before each sample; otherwise they were all in it.
        nbytes: of the files.
        join_seconds: putting the blocks in RAM into a sequence's caches, dequantised; empty if there isn't the memory.
        join_bytes: that it takes.
    """

    shape: str
    tokens: int
    threads: int
    dropped: bool
    files: int
    nbytes: int
    seconds: dict[str, tuple[float, ...]]
    join_seconds: tuple[float, ...] = field(default=())
    join_bytes: int = 0


async def measure(
    shape: Shape, data_dir: Path, *, tokens: int, repeats: int, joins: int, dropped: Sequence[bool] = (False, True)
) -> list[LoadTimes]:
    """
    Args:
        data_dir: an empty folder on the disk that matters.
        joins: repetitions of joining, after everything else.

    Raises:
        OperatorError: the system doesn't drop the files' pages when it is asked to, or some weren't kept.
    """
    rng = np.random.default_rng(0)
    layout = shape.cache_map.layout
    loaded, other = tokens_of(tokens), tokens_of(tokens, seed=1)
    ends = (*range(PRIMED_AT_ONCE, tokens, PRIMED_AT_ONCE), tokens)
    room = tokens * sum(layout.nbytes(kind) for kind in (PartKind.APPEND, PartKind.WINDOW))
    async with opened(data_dir, layout, hot_bytes=room) as store:
        for end in ends:
            await extend(store, layout, AGENT, loaded[:end], rng)
        await store.settled()
        files = list(block_files(data_dir))
        for end in ends:
            await extend(store, layout, OTHER, other[:end], rng)
        await store.settled()
        found = []
        specs = blockfile.ordered(layout.of_kind(PartKind.APPEND))
        with Readers(files, specs, Tuning.io_threads) as readers:
            for drop in dropped:
                seconds = await _interleaved(store, loaded, other, readers, repeats, drop)
                found.append(LoadTimes(shape.name, tokens, readers.threads, drop, len(files), readers.nbytes, seconds))
        del readers
        join_bytes = room + sum(stack.live_bytes for stack in shape.cache_map.stacks) * (tokens + JOIN_ROOM)
        join: tuple[float, ...] = ()
        if join_bytes * JOIN_MARGIN < available_bytes():
            reuse = await _load(store, AGENT, loaded)
            join = tuple(_join(shape, reuse) for _ in range(joins))
    return [replace(times, join_seconds=join, join_bytes=join_bytes) for times in found]


async def _interleaved(
    store: Store, loaded: TokenIds, other: TokenIds, readers: Readers, repeats: int, drop: bool
) -> dict[str, tuple[float, ...]]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-1, repeats):
        for way in np.roll(WAYS, number):
            if way == LOAD:
                await _load(store, AGENT, loaded)
                await _load(store, OTHER, other)  # in place of that
            elif way == ROOM:
                await store.evict(TENANT, AGENT)
                await store.evict(TENANT, OTHER)
            readers.prepare(drop)
            taken = await _timed_load(store, AGENT, loaded) if way in (LOAD, ROOM) else readers.timed(way)
            if number >= 0:  # the first round warms up
                seconds[str(way)].append(taken)
    return {way: tuple(samples) for way, samples in seconds.items()}


async def _load(store: Store, agent_id: str, context: TokenIds) -> Reuse:
    with store.resolve(TENANT, agent_id, context, len(context)) as lease:
        reuse = await store.load(lease)
    if reuse.length != len(context):
        raise OperatorError(f"{reuse.length} of {len(context)} tokens were loaded ({reuse.fallback})")
    return reuse


async def _timed_load(store: Store, agent_id: str, context: TokenIds) -> float:
    began = time.perf_counter()
    reuse = await _load(store, agent_id, context)
    taken = time.perf_counter() - began
    if reuse.warm_tokens != len(context):
        raise OperatorError(f"{len(context) - reuse.warm_tokens} of {len(context)} tokens were in RAM already")
    return taken


def _join(shape: Shape, reuse: Reuse) -> float:
    caches = empty_caches(shape.model, shape.cache_map.codecs)
    began = time.perf_counter()
    for _ in shape.cache_map.fill(caches, reuse, room=JOIN_ROOM):
        pass
    return time.perf_counter() - began


def available_bytes() -> int:
    """Memory that can be had without swapping, as far as the system tells; otherwise half of the machine's."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
