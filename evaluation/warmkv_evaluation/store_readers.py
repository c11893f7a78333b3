"""Block files read by a load's number of threads, but by less than a load: what its time is compared with."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from warmkv_server.contract.kv import TensorSpec
from warmkv_server.contract.store import Durability
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.blocks.arrays import SpareMemory
from warmkv_server.kv.blocks.disk import DiskTier
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.blocks.reader import PIECE_BYTES, PartOrder, read_parts
from warmkv_server.kv.blocks.residency import UNKNOWN, drop_pages, resident_bytes
from warmkv_server.kv.tasks.core import BATCH_BYTES

KEPT, FRESH, REUSED = PLAIN = "kept", "fresh", "reused"
HASHED, READER = "hashed", "reader"


class Readers:
    """Ways of reading whole block files with `threads` threads, each of which reads every so manieth.

    * PLAIN: one system call a file. The buffers of KEPT and REUSED were written to before.
    * HASHED: as KEPT, but piece by piece as the store does it, and every piece is hashed.
    * READER: the store's reader with its checks and arrays, without index or event loop. It finds the memory that it
      had the last time.

    Args:
        specs: the tensors in each of the files.
    """

    def __init__(self, files: Sequence[Path], specs: Sequence[TensorSpec], threads: int) -> None:
        self.files = files
        self.threads = threads
        sizes = [path.stat().st_size for path in files]
        self.nbytes = sum(sizes)
        self._kept = [np.ones(size, np.uint8) for size in sizes]
        self._reused = [np.ones(max(sizes), np.uint8) for _ in range(threads)]
        self._specs = specs
        self._tier = DiskTier(files[0].parents[2], Files(Durability.NONE), 0)
        self._a_batch = max(1, BATCH_BYTES * len(files) // self.nbytes)
        self._spare = SpareMemory(2 * self.nbytes)
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Readers:
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
        """Seconds of one read of all files. Fresh memory goes back outside of them."""
        return self.read(way)[0]

    def read(self, way: str) -> tuple[float, list[list[Any]]]:
        """Seconds of one read of all files, and what each thread holds after it, in the order of its files."""
        numbers = [range(thread, len(self.files), self.threads) for thread in range(self.threads)]
        if way == READER:
            work: list[Iterator[object]] = [self._parts([self._order(n) for n in share]) for share in numbers]
        else:
            work = [self._buffers(way, thread, share) for thread, share in enumerate(numbers)]
        began = time.perf_counter()
        held: list[list[Any]] = list(self._pool.map(list, work))
        return time.perf_counter() - began, held

    def _buffers(self, way: str, thread: int, numbers: Sequence[int]) -> Iterator[object]:
        """The files of these numbers, each in its buffer."""
        for number in numbers:
            fd = os.open(self.files[number], os.O_RDONLY | os.O_CLOEXEC)
            try:
                buffer = self._buffer(way, thread, number)
                if way == HASHED:
                    _read_hashed(fd, self._kept[number].data)
                else:
                    os.readv(fd, [buffer])  # type: ignore[list-item]
                yield buffer
            finally:
                os.close(fd)

    def _buffer(self, way: str, thread: int, number: int) -> NDArray[np.uint8] | mmap.mmap:
        size = self._kept[number].size
        if way == REUSED:
            return self._reused[thread][:size]
        return mmap.mmap(-1, size) if way == FRESH else self._kept[number]

    def _order(self, number: int) -> PartOrder:
        path = self.files[number]
        with path.open("rb") as file:
            size = blockfile.header_size(file.read(blockfile.LENGTH_BYTES), path.stat().st_size)
            file.seek(0)
            parsed = blockfile.parse(file.read(size))
        return PartOrder(parsed.info, self._specs, parsed.digest)

    def _parts(self, orders: Sequence[PartOrder]) -> Iterator[object]:
        for at in range(0, len(orders), self._a_batch):
            for outcome in read_parts(self._tier, orders[at : at + self._a_batch], self._spare):
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome


def _read_hashed(fd: int, memory: memoryview) -> None:
    hasher = xxhash.xxh3_128()
    for at in range(0, len(memory), PIECE_BYTES):
        piece = memory[at : at + PIECE_BYTES]
        hasher.update(piece[: os.preadv(fd, [piece], at)])
    hasher.digest()
