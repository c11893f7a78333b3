"""How fast a context comes from disk into RAM, against reading the same files and doing nothing with them.

A load reads, verifies and builds: it ends with an evaluated array for every tensor of every block. The plain read is
one `readv` a file, by as many threads, and differs in where the bytes go:

* kept: into memory that was touched before, of its own for each file. What a loader with free memory at hand would do.
* fresh: into memory that is new to the process, so that the system clears every page of it first.
* reused: each thread reads all its files into one buffer, which the processor's cache holds. No loader can: the bytes
  of the file before are gone.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from warmkv_server.engine.layout import empty_caches
from warmkv_server.errors import OperatorError
from warmkv_server.evaluation.store_contexts import TENANT, block_files, extend, opened, tokens_of
from warmkv_server.evaluation.store_shapes import Shape
from warmkv_server.kv.residency import UNKNOWN, drop_pages, resident_bytes
from warmkv_server.kv.store import Store, StoreSettings, TokenIds
from warmkv_server.kv.types import Reuse

AGENT = "loaded"
PRIMED_AT_ONCE = 4096
JOIN_ROOM = 64

LOAD, KEPT, FRESH, REUSED = "load", "kept", "fresh", "reused"
WAYS = (LOAD, KEPT, FRESH, REUSED)


@dataclass(frozen=True)
class LoadTimes:
    """Samples in seconds, the n-th of each way taken one after another.

    Attributes:
        dropped: the files were out of the page cache before each sample; otherwise they were all in it.
        nbytes: of the files.
        join_seconds: putting the blocks in RAM into a sequence's caches, dequantised.
    """

    shape: str
    tokens: int
    threads: int
    dropped: bool
    files: int
    nbytes: int
    seconds: dict[str, tuple[float, ...]]
    join_seconds: tuple[float, ...] = field(default=())


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
    context = tokens_of(tokens)
    threads = StoreSettings(data_dir).io_threads
    async with opened(data_dir, shape.cache_map.layout) as store:
        for end in (*range(PRIMED_AT_ONCE, tokens, PRIMED_AT_ONCE), tokens):
            await extend(store, shape.cache_map.layout, AGENT, context[:end], rng)
        await store.settled()
        found = []
        with PlainReader(list(block_files(data_dir)), threads) as plain:
            for drop in dropped:
                seconds = await _interleaved(store, context, plain, repeats, drop)
                found.append(LoadTimes(shape.name, tokens, threads, drop, len(plain.files), plain.nbytes, seconds))
        reuse, _ = await _load(store, context)
        join = tuple(_join(shape, reuse) for _ in range(joins))
    return [LoadTimes(**{**vars(times), "join_seconds": join}) for times in found]


async def _interleaved(
    store: Store, context: TokenIds, plain: PlainReader, repeats: int, drop: bool
) -> dict[str, tuple[float, ...]]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-1, repeats):
        for way in np.roll(WAYS, number):
            await store.evict(TENANT, AGENT)
            plain.prepare(drop)
            taken = (await _load(store, context))[1] if way == LOAD else plain.timed(way)
            if number >= 0:  # the first round warms up
                seconds[str(way)].append(taken)
    return {way: tuple(samples) for way, samples in seconds.items()}


async def _load(store: Store, context: TokenIds) -> tuple[Reuse, float]:
    await store.evict(TENANT, AGENT)
    began = time.perf_counter()
    with store.resolve(TENANT, AGENT, context, len(context)) as lease:
        reuse = await store.load(lease)
    taken = time.perf_counter() - began
    if reuse.warm_tokens != len(context):
        raise OperatorError(f"{reuse.warm_tokens} of {len(context)} tokens were read ({reuse.fallback})")
    return reuse, taken


def _join(shape: Shape, reuse: Reuse) -> float:
    caches = empty_caches(shape.model, shape.cache_map.codec)
    began = time.perf_counter()
    for _ in shape.cache_map.fill(caches, reuse, room=JOIN_ROOM):
        pass
    return time.perf_counter() - began


class PlainReader:
    """Reads whole files with `threads` threads; its buffers were all written to before."""

    def __init__(self, files: Sequence[Path], threads: int) -> None:
        self.files = files
        sizes = [path.stat().st_size for path in files]
        self.nbytes = sum(sizes)
        self._threads = threads
        self._kept = [np.ones(size, np.uint8) for size in sizes]
        self._reused = [np.ones(max(sizes), np.uint8) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def prepare(self, drop: bool) -> None:
        """Have the files in the page cache, or out of it."""
        if drop:
            drop_pages(self.files)
        elif resident_bytes(self.files) < self.nbytes:
            self.timed(REUSED)  # what the system has dropped by itself
        resident = resident_bytes(self.files)
        if resident != UNKNOWN and resident != (0 if drop else self.nbytes):
            raise OperatorError(
                f"{resident} of the files' {self.nbytes} bytes are in the page cache, which can't be had otherwise "
                "here; measure fewer tokens, or on another file system"
            )

    def timed(self, way: str) -> float:
        """Seconds of one read of all files."""
        began = time.perf_counter()
        held = list(self._pool.map(self._some, range(self._threads), [self._targets(way)] * self._threads))
        taken = time.perf_counter() - began
        del held  # fresh memory goes back outside of the measured time
        return taken

    def _targets(self, way: str) -> Callable[[int, int], np.ndarray[tuple[int], np.dtype[np.uint8]] | mmap.mmap]:
        """What the file of a number is read into, by the thread of a number."""
        if way == KEPT:
            return lambda _, number: self._kept[number]
        if way == REUSED:
            return lambda thread, number: self._reused[thread][: self._kept[number].size]
        return lambda _, number: mmap.mmap(-1, self._kept[number].size)

    def _some(self, thread: int, target: Callable[[int, int], object]) -> list[object]:
        held = []
        for number in range(thread, len(self.files), self._threads):
            fd = os.open(self.files[number], os.O_RDONLY)
            try:
                buffer = target(thread, number)
                os.readv(fd, [buffer])  # type: ignore[list-item]
                held.append(buffer)
            finally:
                os.close(fd)
        return held
