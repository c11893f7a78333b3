"""Reading block files into arrays, checked before anything is made of them. Blocking.

A large file is read into the memory of its arrays piece by piece, and each piece hashed while the processor's cache has
it. The arrays are nobody's until the checksum is right. A small one is read whole, as the cache has room for it, and
its tensors are copied into arrays, which takes fewer steps.

`mx.load` has no place for a checksum (a file object in Python deadlocks with any MLX call that waits for a stream while
it holds the interpreter's lock), and an I/O error on a plain path ends the process, as it would behind a mapping of the
file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from warmkv_server.contract.kv import Fallback, Tensors, TensorSpec
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.blocks.arrays import stored_shape, view
from warmkv_server.kv.blocks.blockfile import BadFile, BlockInfo
from warmkv_server.kv.blocks.files import open_file
from warmkv_server.kv.blocks.spare import Part, SpareMemory

_FIRST_READ = 16 << 10
"""Bytes; the header and more."""
PIECE_BYTES = 1 << 20
"""Read and hashed at a time: few turns of the interpreter's lock, and still in a cache when it is hashed."""
SMALL_BYTES = 512 << 10
"""The most tensors of a small file."""


@dataclass(frozen=True, slots=True)
class PartOrder:
    """A block file to be read, and what has to be in it; `digest` is the checksum that the index has."""

    path: Path
    info: BlockInfo
    specs: Sequence[TensorSpec]
    digest: str


def read_parts(orders: Sequence[PartOrder], spare: SpareMemory) -> list[Tensors | BadFile | OSError]:
    """Read block files one after another. All of them are open meanwhile.

    The system is asked for the small ones beforehand. Not for the large: its own reading ahead of the pieces is faster
    on a disk than having whole files fetched.

    Returns:
        For each its evaluated arrays; BadFile if it is missing, damaged, or another one; OSError if it can't be read
        now.
    """
    small = [blockfile.payload_size(order.specs, order.info.count) <= SMALL_BYTES for order in orders]
    with ExitStack() as files:
        opened = [_opened(order.path, files, ahead=ahead) for order, ahead in zip(orders, small, strict=True)]
        large = [order for order, is_small in zip(orders, small, strict=True) if not is_small]
        parts = iter(spare.parts((order.specs, order.info.count) for order in large))
        ways = [_read_small if is_small else partial(_read_large, part=next(parts)) for is_small in small]
        return [
            _read(fd, order, way) if isinstance(fd, int) else fd
            for fd, order, way in zip(opened, orders, ways, strict=True)
        ]


def _opened(path: Path, files: ExitStack, *, ahead: bool) -> int | BadFile | OSError:
    """
    Args:
        files: will close it.
        ahead: have the system fetch it before it is read.
    """
    try:
        fd = _open(path)
    except (BadFile, OSError) as error:
        return error
    files.callback(os.close, fd)
    if ahead and hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    return fd


def _read(fd: int, order: PartOrder, way: Callable[[int, PartOrder], Tensors]) -> Tensors | BadFile | OSError:
    try:
        try:
            return way(fd, order)
        except BadFile as bad:
            return bad if _is_whole(fd) else BadFile(Fallback.CHECKSUM, f"damaged: {bad}")
    except OSError as error:
        return error


def _read_large(fd: int, order: PartOrder, *, part: Part) -> Part:
    size = os.fstat(fd).st_size
    first = os.pread(fd, _FIRST_READ, 0)
    start = blockfile.header_size(first, size)
    head = first[:start] if start <= len(first) else os.pread(fd, start, 0)
    parsed = blockfile.parse(head)
    if start + parsed.payload != size:
        raise BadFile(Fallback.FORMAT, f"{size} bytes instead of {start + parsed.payload}")
    _expect(parsed, order)
    _fill(fd, head, [blockfile.flat(view(part[spec.name])) for spec in order.specs], order.digest)
    return part


def _read_small(fd: int, order: PartOrder) -> Tensors:
    content = os.pread(fd, min(os.fstat(fd).st_size, blockfile.HEADER_LIMIT + SMALL_BYTES), 0)
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


def verify_file(path: Path) -> blockfile.Parsed:
    """Read a whole block file and check it against itself, whatever model it is of.

    Raises:
        BadFile, OSError
    """
    fd = _open(path)
    try:
        if not _is_whole(fd):
            raise BadFile(Fallback.CHECKSUM, "the checksum is another, or there is none")
        size = os.fstat(fd).st_size
        start = blockfile.header_size(os.pread(fd, blockfile.LENGTH_BYTES, 0), size)
        parsed = blockfile.parse(os.pread(fd, start, 0))
        if start + parsed.payload != size:
            raise BadFile(Fallback.FORMAT, f"{size} bytes instead of {start + parsed.payload}")
        return parsed
    finally:
        os.close(fd)


def _fill(fd: int, head: bytes, payload: Sequence[memoryview], digest: str) -> None:
    """Read what follows the header into memory of exactly that size; only then it is known whether it is right."""
    hasher = blockfile.begin_checksum(head)
    at = len(head)
    for memory in payload:
        end = at + len(memory)
        while at < end:
            piece = memory[len(memory) - (end - at) :][:PIECE_BYTES]
            got = os.preadv(fd, [piece], at)
            if not got:
                raise BadFile(Fallback.FORMAT, "cut off while it was read")
            hasher.update(piece[:got])
            at += got
    if hasher.hexdigest() != digest:
        raise BadFile(Fallback.CHECKSUM, "the checksum is another")


def _open(path: Path) -> int:
    try:
        return open_file(path)
    except FileNotFoundError as error:
        raise BadFile(Fallback.MISSING_BLOCK, "missing") from error


def _is_whole(fd: int) -> bool:
    """Whether the checksum, wherever the rest of the header leads, fits the file."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, blockfile.DIGEST_AT + blockfile.DIGEST_HEX, 0)
    if len(head) < blockfile.DIGEST_AT + blockfile.DIGEST_HEX:
        return False
    hasher = blockfile.begin_checksum(head)
    for at in range(len(head), size, PIECE_BYTES):
        hasher.update(os.pread(fd, min(PIECE_BYTES, size - at), at))
    return hasher.hexdigest().encode() == head[blockfile.DIGEST_AT :]
