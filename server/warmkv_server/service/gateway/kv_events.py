"""Which prefixes are held, told to gateways that send a conversation where its KV is.

The store shares token by token, and gateways count in blocks: so these are virtual, of 64 tokens each, and there as
long as a context has them. With the store's own 256 a conversation of fewer tokens could not be found.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from smg_grpc_proto.generated import common_pb2 as common

from warmkv_server.contract.store import HeldChange, HeldSnapshot

BLOCK_TOKENS = 64
_EVENT_BLOCKS = 256
"""Of one event, some hundred kilobytes."""

Hashes = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]


async def batches(held: AsyncIterable[HeldSnapshot | HeldChange], cursor: int) -> AsyncIterator[common.KvEventBatch]:
    """What is held now, and then what changes.

    Args:
        held: of the one tenant that the gateway serves.
        cursor: the last number that the gateway has; 0 for none. What came before it was another stream's, so that
            everything is told again, under the numbers behind it: others would be a gap, or old. Without one they begin
            with the clock, and are behind those of an earlier run.
    """
    number = cursor + 1 if cursor else time.time_ns() // 1000
    blocks = Blocks()
    async for news in held:
        for event in blocks.snapshot(news) if isinstance(news, HeldSnapshot) else blocks.change(news):
            yield common.KvEventBatch(sequence_number=number, timestamp=time.time(), events=[event])
            number += 1
            await asyncio.sleep(0)  # a snapshot may be of many


class Blocks:
    """The blocks that one gateway knows of, and how many contexts have each."""

    def __init__(self) -> None:
        self._holders: Counter[int] = Counter()

    def snapshot(self, news: HeldSnapshot) -> Iterator[common.KvCacheEvent]:
        """All there are, in place of what was told before."""
        self._holders.clear()
        yield common.KvCacheEvent(cleared=common.KvCacheCleared())
        for tokens in news.contexts.values():
            yield from self._grow(tokens, hashes_of(tokens), 0)

    def change(self, news: HeldChange) -> Iterator[common.KvCacheEvent]:
        """What a context has more and less than before."""
        before, after = hashes_of(news.before), hashes_of(news.after)
        alike = _alike(before, after)
        yield from self._grow(news.after, after, alike)
        gone = []
        for block in before[alike:].tolist():
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                gone.append(block)
        if gone:
            yield common.KvCacheEvent(removed=common.KvBlocksRemoved(block_hashes=gone))

    def _grow(self, tokens: Ids, hashes: Hashes, first: int) -> Iterator[common.KvCacheEvent]:
        """One context more has the blocks from `first` on; those that nobody had are told, each behind its parent."""
        listed = hashes.tolist()
        new = next((n for n in range(first, len(listed)) if not self._holders[listed[n]]), len(listed))
        self._holders.update(listed[first:])
        for start in range(new, len(listed), _EVENT_BLOCKS):
            blocks = [
                _block(tokens, listed, number) for number in range(start, min(start + _EVENT_BLOCKS, len(listed)))
            ]
            parent = listed[start - 1] if start else None
            yield common.KvCacheEvent(stored=common.KvBlocksStored(blocks=blocks, parent_block_hash=parent))


def hashes_of(tokens: Ids) -> Hashes:
    """Of each whole block, with all that is before it."""
    data = np.ascontiguousarray(tokens, np.int32).tobytes()
    size, before = BLOCK_TOKENS * 4, b""
    found = np.empty(len(data) // size, np.int64)
    for number in range(len(found)):
        before = blake2b(before + data[number * size : (number + 1) * size], digest_size=8).digest()
        found[number] = int.from_bytes(before, "little", signed=True)
    return found


def _alike(first: Hashes, second: Hashes) -> int:
    """How many blocks they begin with alike."""
    length = min(len(first), len(second))
    unlike = np.flatnonzero(first[:length] != second[:length])
    return int(unlike[0]) if unlike.size else length


def _block(tokens: Ids, hashes: Sequence[int], number: int) -> common.KvBlock:
    ids = tokens[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS].tolist()
    return common.KvBlock(block_hash=hashes[number], token_ids=ids, block_size=BLOCK_TOKENS)
