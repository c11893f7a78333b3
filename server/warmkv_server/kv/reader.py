"""Reading block files into arrays, checked before anything is made of them. Blocking.

A file is read and hashed piece by piece in memory that the thread has had all along, and copied from there into new
arrays. The memory of an array can be had without clearing it first only by a copy: `mx.load` has no place for a
checksum (a file object in Python deadlocks with any MLX call that waits for a stream while it holds the interpreter's
lock), and an I/O error on a plain path ends the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from warmkv_server.kv import blockfile
from warmkv_server.kv.arrays import copied
from warmkv_server.kv.blockfile import BadFile, BlockInfo
from warmkv_server.kv.types import Fallback, TensorSpec

_FIRST_READ = 16 << 10
"""Bytes; the header and more."""
_CHUNK = 1 << 20
"""Bytes read and hashed at a time: few system calls, and still in the processor's cache when they are hashed."""


@dataclass(frozen=True, slots=True)
class PartOrder:
    """A block file to be read, and what has to be in it; `digest` is the checksum that the index has."""

    path: Path
    info: BlockInfo
    specs: Sequence[TensorSpec]
    digest: str


def read_parts(orders: Sequence[PartOrder]) -> list[dict[str, mx.array] | BadFile | OSError]:
    """Read block files one after another, while the system fetches those that come later.

    Returns:
        For each its arrays; BadFile if it is missing, damaged, or another one; OSError if it can't be read now.
    """
    files = [_open_ahead(order.path) for order in orders]
    try:
        return [
            _read_part(file, order) if isinstance(file, int) else file
            for file, order in zip(files, orders, strict=True)
        ]
    finally:
        for file in files:
            if isinstance(file, int):
                os.close(file)


def _read_part(fd: int, order: PartOrder) -> dict[str, mx.array] | BadFile | OSError:
    try:
        head = _expected_head(fd, order.info, order.specs, order.digest)
        return _read(fd, head, order.info, order.specs, order.digest)
    except BadFile as bad:
        try:
            return bad if _is_whole(fd) else BadFile(Fallback.CHECKSUM, f"damaged: {bad}")
        except OSError as error:
            return error
    except OSError as error:
        return error


def _open_ahead(path: Path) -> int | BadFile | OSError:
    """Open a file and have the system fetch all of it, not a little ahead of each chunk."""
    try:
        fd = _open(path)
    except (BadFile, OSError) as error:
        return error
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    return fd


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


def _read(fd: int, head: bytes, info: BlockInfo, specs: Sequence[TensorSpec], digest: str) -> dict[str, mx.array]:
    hasher = blockfile.begin_checksum(head)
    payload = _scratch.of(blockfile.payload_size(specs, info.count))
    done = 0
    while done < len(payload):
        got = os.preadv(fd, [payload[done : done + _CHUNK]], len(head) + done)
        if not got:
            raise BadFile(Fallback.FORMAT, "cut off while it was read")
        hasher.update(payload[done : done + got])
        done += got
    if hasher.hexdigest() != digest:
        raise BadFile(Fallback.CHECKSUM, "the checksum is another")
    made: dict[str, mx.array] = {}
    for spec in specs:
        size = blockfile.payload_size([spec], info.count)
        made[spec.name], payload = copied(spec, info.count, payload[:size]), payload[size:]
    return made


class _Scratch(threading.local):
    """Memory of each reading thread, as large as the largest file it has read."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def of(self, size: int) -> memoryview:
        if len(self._memory) < size:
            self._memory = bytearray(size)
        return memoryview(self._memory)[:size]


_scratch = _Scratch()


def _expected_head(fd: int, info: BlockInfo, specs: Sequence[TensorSpec], digest: str) -> bytes:
    """The header's bytes, if the header and the file's size are what they have to be."""
    size = os.fstat(fd).st_size
    first = os.pread(fd, _FIRST_READ, 0)
    start = blockfile.header_size(first, size)
    head = first[:start] if start <= len(first) else os.pread(fd, start, 0)
    parsed = blockfile.parse(head)
    blockfile.expect(parsed, info, specs)
    if start + parsed.payload != size:
        raise BadFile(Fallback.FORMAT, f"{size} bytes instead of {start + parsed.payload}")
    if parsed.digest != digest:
        raise BadFile(Fallback.FORMAT, "another version of the node than the index has")
    return head


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BadFile(Fallback.MISSING_BLOCK, "missing") from error


def _is_whole(fd: int) -> bool:
    """Whether the checksum, wherever the rest of the header leads, fits the file."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, blockfile.DIGEST_AT + blockfile.DIGEST_HEX, 0)
    if len(head) < blockfile.DIGEST_AT + blockfile.DIGEST_HEX:
        return False
    hasher = blockfile.begin_checksum(head)
    for at in range(len(head), size, _CHUNK):
        hasher.update(os.pread(fd, min(_CHUNK, size - at), at))
    return hasher.hexdigest().encode() == head[blockfile.DIGEST_AT :]
