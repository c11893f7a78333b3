"""Reading objects into arrays, checked before anything is made of them. Blocking.

A large file is read into the memory of its arrays piece by piece, and each piece hashed while the processor's cache has
it. The arrays are nobody's until the checksum is right. A small one is read whole, as the cache has room for it, and
its tensors are copied into arrays, which takes fewer steps.

`mx.load` has no place for a checksum (a file object in Python deadlocks with any MLX call that waits for a stream while
it holds the interpreter's lock), and an I/O error on a plain path ends the process, as it would behind a mapping of the
file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from warmkv_server.contract.kv import Fallback, Tensors, TensorSpec
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.blocks.arrays import RecycledArrays, SpareMemory, stored_shape, view
from warmkv_server.kv.blocks.blockfile import BadFile, BlockInfo
from warmkv_server.kv.blocks.names import object_name
from warmkv_server.kv.blocks.tier import Block, BlockTier

_FIRST_READ = 16 << 10
"""Bytes; the header and more."""
PIECE_BYTES = 1 << 20
"""Read and hashed at a time: few turns of the interpreter's lock, and still in a cache when it is hashed."""
SMALL_BYTES = 512 << 10
"""The most tensors of a small file."""


@dataclass(frozen=True, slots=True)
class PartOrder:
    """A node's object to be read, and what has to be in it; `digest` is the checksum that the index has."""

    info: BlockInfo
    specs: Sequence[TensorSpec]
    digest: str

    @property
    def name(self) -> str:
        return object_name(self.info.node, self.info.kind, self.digest)


def read_parts(tier: BlockTier, orders: Sequence[PartOrder], spare: SpareMemory) -> list[Tensors | BadFile | OSError]:
    """Read objects one after another. All of them are open meanwhile.

    The system is asked for the small ones beforehand. Not for the large: its own reading ahead of the pieces is faster
    on a disk than having whole files fetched.

    Returns:
        For each its evaluated arrays; BadFile if it is missing, damaged, or another one; OSError if it can't be read
        now.
    """
    small = [blockfile.payload_size(order.specs, order.info.count) <= SMALL_BYTES for order in orders]
    with ExitStack() as blocks:
        opened = [_opened(tier, order.name, blocks, ahead=ahead) for order, ahead in zip(orders, small, strict=True)]
        large = [order for order, is_small in zip(orders, small, strict=True) if not is_small]
        parts = iter(spare.parts((order.specs, order.info.count) for order in large))
        ways = [_read_small if is_small else partial(_read_large, part=next(parts)) for is_small in small]
        return [
            block if isinstance(block, Exception) else _read(block, order, way)
            for block, order, way in zip(opened, orders, ways, strict=True)
        ]


def _opened(tier: BlockTier, name: str, blocks: ExitStack, *, ahead: bool) -> Block | BadFile | OSError:
    """
    Args:
        blocks: will close it.
        ahead: have the system fetch it before it is read.
    """
    try:
        block = tier.open(name)
    except FileNotFoundError:
        return BadFile(Fallback.MISSING_BLOCK, "missing")
    except OSError as error:
        return error
    blocks.callback(block.close)
    if ahead:
        block.prefetch()
    return block


def _read(block: Block, order: PartOrder, way: Callable[[Block, PartOrder], Tensors]) -> Tensors | BadFile | OSError:
    try:
        try:
            return way(block, order)
        except BadFile as bad:
            found = bad if _is_whole(block) else BadFile(Fallback.CHECKSUM, f"damaged: {bad}")
            found.version = block.version
            return found
    except OSError as error:
        return error


def _read_large(block: Block, order: PartOrder, *, part: RecycledArrays) -> RecycledArrays:
    parsed, head = read_header(block)
    _expect(parsed, order)
    _fill(block, head, [blockfile.flat(view(part[spec.name])) for spec in order.specs], order.digest)
    return part


def _read_small(block: Block, order: PartOrder) -> Tensors:
    content = block.read(0, min(block.nbytes, blockfile.HEADER_LIMIT + SMALL_BYTES))
    parsed = blockfile.verify(content)
    _expect(parsed, order)
    at = len(content) - parsed.payload
    arrays = {}
    for spec in order.specs:
        shape, dtype = stored_shape(spec, order.info.count), np.dtype(spec.dtype)
        values = np.frombuffer(content, dtype, math.prod(shape), at).reshape(shape)
        arrays[spec.name] = mx.array(values)
        at += values.nbytes
    return arrays


def _expect(parsed: blockfile.Parsed, order: PartOrder) -> None:
    blockfile.expect(parsed, order.info, order.specs)
    if parsed.digest != order.digest:
        raise BadFile(Fallback.FORMAT, "another version of the node than the index has")


def read_header(block: Block, *, whole: bool = True) -> tuple[blockfile.Parsed, bytes]:
    """What an object's header says, taken apart but not believed, and the header itself.

    Args:
        whole: the payload has to be as long as the header says.

    Raises:
        BadFile, OSError
    """
    first = block.read(0, _FIRST_READ)
    start = blockfile.header_size(first, block.nbytes)
    head = first[:start] if start <= len(first) else block.read(0, start)
    parsed = blockfile.parse(head)
    if whole and start + parsed.payload != block.nbytes:
        raise BadFile(Fallback.FORMAT, f"{block.nbytes} bytes instead of {start + parsed.payload}")
    return parsed, head


def verify_block(block: Block) -> blockfile.Parsed:
    """Read a whole object and check it against itself, whatever model it is of.

    Raises:
        BadFile, OSError
    """
    if not _is_whole(block):
        raise BadFile(Fallback.CHECKSUM, "the checksum is another, or there is none")
    return read_header(block)[0]


def _fill(block: Block, head: bytes, payload: Sequence[memoryview], digest: str) -> None:
    """Read what follows the header into memory of exactly that size; only then it is known whether it is right."""
    hasher = blockfile.begin_checksum(head)
    at = len(head)
    for memory in payload:
        end = at + len(memory)
        while at < end:
            piece = memory[len(memory) - (end - at) :][:PIECE_BYTES]
            got = block.read_into(piece, at)
            if not got:
                raise BadFile(Fallback.FORMAT, "cut off while it was read")
            hasher.update(piece[:got])
            at += got
    if hasher.hexdigest() != digest:
        raise BadFile(Fallback.CHECKSUM, "the checksum is another")


def _is_whole(block: Block) -> bool:
    """Whether the checksum, wherever the rest of the header leads, fits the object."""
    head = block.read(0, blockfile.DIGEST_AT + blockfile.DIGEST_HEX)
    if len(head) < blockfile.DIGEST_AT + blockfile.DIGEST_HEX:
        return False
    hasher = blockfile.begin_checksum(head)
    for at in range(len(head), block.nbytes, PIECE_BYTES):
        hasher.update(block.read(at, min(PIECE_BYTES, block.nbytes - at)))
    return hasher.hexdigest().encode() == head[blockfile.DIGEST_AT :]
