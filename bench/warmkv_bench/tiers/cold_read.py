"""Reading a context's block files and doing nothing with them: what any load from disk has to pay."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

THREADS = 4
"""As many as the server reads with."""
_LENGTH_BYTES = 8


def files_of(data_dir: Path, tokens: int) -> list[Path]:
    """The block files that hold tokens before `tokens`, in a data directory with one context and its prefixes.

    What a file holds stands in its header; see the server's docs/format.md.
    """
    return [path for path in sorted((data_dir / "blocks").rglob("*.safetensors")) if _end(path) <= tokens]


def total_bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def read_ms(files: Sequence[Path]) -> float:
    """Milliseconds to read all of the files whole, into new memory that is kept to the end, with THREADS threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(int, range(THREADS)))  # the threads are there
        begin = time.perf_counter()
        held = list(pool.map(_read, files))
        took = time.perf_counter() - begin
    del held
    return took * 1e3


def _read(path: Path) -> object:
    fd = os.open(path, os.O_RDONLY)
    try:
        buffer = np.empty(os.fstat(fd).st_size, np.uint8)
        rest = buffer.data
        while len(rest) and (got := os.readv(fd, [rest])):
            rest = rest[got:]
        return buffer
    finally:
        os.close(fd)


def _end(path: Path) -> int:
    """Tokens of the context up to the end of what a block file holds."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        described = json.loads(file.read(size))["__metadata__"]
    return int(described["start"]) + int(described["count"])
