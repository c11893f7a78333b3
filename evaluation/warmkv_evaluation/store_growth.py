"""What it costs to let a context grow turn by turn: bytes written, and the time of a durable commit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from warmkv_evaluation.store_contexts import TENANT, Noise, block_files, extend, opened, tokens_of
from warmkv_evaluation.store_shapes import Shape
from warmkv_server.kv.store import Store, TokenIds

GROWING, SHORT, LONG = "growing", "short", "long"
SHORT_TOKENS = 1024
_ACCOUNT = Path("/proc/self/io")


@dataclass(frozen=True)
class Growth:
    """A context grown from nothing, by `turn` tokens a turn.

    Attributes:
        kv_bytes: of the context at the end, without headers.
        block_bytes, index_bytes: written, as the store counts them.
        written_bytes: handed to write calls by the process while the context grew, the index's log, its checkpoints
            and the one at the end among them; None where the system doesn't count them.
        files_bytes: block files at the end.
        short_seconds, long_seconds: durable commits of one turn each on a context of 1,024 tokens and on the whole
            one, taken in turns.
    """

    shape: str
    tokens: int
    turn: int
    kv_bytes: int
    block_bytes: int
    index_bytes: int
    written_bytes: int | None
    files_bytes: int
    short_seconds: tuple[float, ...]
    long_seconds: tuple[float, ...]

    @property
    def amplification(self) -> float:
        """Bytes written for each byte of KV that is there at the end."""
        counted = self.block_bytes + self.index_bytes
        return (counted if self.written_bytes is None else self.written_bytes) / self.kv_bytes

    @property
    def flatness(self) -> float:
        """Commit time on the whole context by that on 1,024 tokens, of medians."""
        return statistics.median(self.long_seconds) / statistics.median(self.short_seconds)


async def grow(shape: Shape, data_dir: Path, *, tokens: int, turn: int, commits: int) -> Growth:
    """
    Args:
        data_dir: an empty folder on the disk that matters.
        commits: turns on the short and on the long context each.
    """
    layout = shape.cache_map.layout
    rng = np.random.default_rng(0)
    context = tokens_of(tokens)
    async with opened(data_dir, layout) as store:
        before, opening = written_bytes(), store.stats().metadata_bytes_written
        for end in (*range(turn, tokens, turn), tokens):
            await extend(store, layout, GROWING, context[:end], rng)
        await store.settled()
        stats = store.stats()
        files = sum(block_files(data_dir).values())
    after = written_bytes()  # with the checkpoint of the end
    async with opened(data_dir, layout) as store:
        await extend(store, layout, SHORT, tokens_of(SHORT_TOKENS, seed=1), rng)
        with store.resolve(TENANT, GROWING, context, tokens) as lease:
            await store.load(lease)
        short, long = await _commit_times(store, shape, turn, commits, rng)
    return Growth(
        shape=shape.name,
        tokens=tokens,
        turn=turn,
        kv_bytes=sum(layout.nbytes(kind) * held for kind, held in shape.held(tokens).items()),
        block_bytes=stats.kv_bytes_written,
        index_bytes=stats.metadata_bytes_written - opening,
        written_bytes=None if before is None or after is None else after - before,
        files_bytes=files,
        short_seconds=tuple(short),
        long_seconds=tuple(long),
    )


async def _commit_times(
    store: Store, shape: Shape, turn: int, commits: int, rng: Noise
) -> tuple[list[float], list[float]]:
    """Turns on a short and a long context, one after the other; forks, so that both stay as long as they are.

    Each goes on for as many turns as it takes to fill a block, and merge it.
    """
    sides = {SHORT: SHORT, LONG: GROWING}
    found: dict[str, list[float]] = {side: [] for side in sides}
    turns = 256 // turn + 1
    for number in range(-(-commits // turns)):
        forks: dict[str, TokenIds] = {}
        for side, source in sides.items():
            await store.fork(TENANT, source, f"{side}.{number}")
            forks[side] = store.tokens(TENANT, source)
        for _ in range(turns):
            order: Sequence[str] = (SHORT, LONG) if number % 2 else (LONG, SHORT)
            for side in order:
                forks[side] = np.concatenate([forks[side], tokens_of(turn, seed=2 + number)])
                committed = await extend(store, shape.cache_map.layout, f"{side}.{number}", forks[side], rng)
                found[side].append(committed.seconds)
        for side in sides:
            await store.delete(TENANT, f"{side}.{number}")
        await store.settled()
    return found[SHORT], found[LONG]


def written_bytes(read: Callable[[], str] = _ACCOUNT.read_text) -> int | None:
    """Bytes that this process has handed to write calls so far, whatever the file; None where that isn't counted."""
    try:
        counted = dict(line.split(": ") for line in read().splitlines())
    except FileNotFoundError:
        return None
    return int(counted["wchar"])
