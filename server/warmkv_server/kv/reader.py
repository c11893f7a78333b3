"""Reading block files into arrays, checked before anything is made of them. Blocking.

A file is read into the memory of its arrays piece by piece, and each piece hashed while the processor's cache has it.
The arrays are nobody's until the checksum is right. `mx.load` has no place for a checksum (a file object in Python
deadlocks with any MLX call that waits for a stream while it holds the interpreter's lock), and an I/O error on a plain
path ends the process, as it would behind a mapping of the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from warmkv_server.kv import blockfile
from warmkv_server.kv.arrays import view
from warmkv_server.kv.blockfile import BadFile, BlockInfo
from warmkv_server.kv.spare import Part, SpareMemory
from warmkv_server.kv.types import Fallback, TensorSpec

_FIRST_READ = 16 << 10
"""Bytes; the header and more."""
PIECE_BYTES = 1 << 20
"""Read and hashed at a time: few turns of the interpreter's lock, and still in a cache when it is hashed."""


@dataclass(frozen=True, slots=True)
class PartOrder:
    """A block file to be read, and what has to be in it; `digest` is the checksum that the index has."""

    path: Path
    info: BlockInfo
    specs: Sequence[TensorSpec]
    digest: str


def read_parts(orders: Sequence[PartOrder], spare: SpareMemory) -> list[Part | BadFile | OSError]:
    """Read block files one after another.

    The system is not told what comes: its own reading ahead of the pieces is faster on a disk than having whole files
    fetched, and to tell it of pages that it has takes time.

    Returns:
        For each its evaluated arrays; BadFile if it is missing, damaged, or another one; OSError if it can't be read
        now.
    """
    parts = spare.parts((order.specs, order.info.count) for order in orders)
    return [_read_part(order, part) for order, part in zip(orders, parts, strict=True)]


def _read_part(order: PartOrder, part: Part) -> Part | BadFile | OSError:
    try:
        fd = _open(order.path)
    except (BadFile, OSError) as error:
        return error
    try:
        head = _expected_head(fd, order.info, order.specs, order.digest)
        _fill(fd, head, [blockfile.flat(view(part[spec.name])) for spec in order.specs], order.digest)
        return part
    except BadFile as bad:
        try:
            return bad if _is_whole(fd) else BadFile(Fallback.CHECKSUM, f"damaged: {bad}")
        except OSError as error:
            return error
    except OSError as error:
        return error
    finally:
        os.close(fd)


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
    for at in range(len(head), size, PIECE_BYTES):
        hasher.update(os.pread(fd, min(PIECE_BYTES, size - at), at))
    return hasher.hexdigest().encode() == head[blockfile.DIGEST_AT :]
