"""Copying words: from what a request holds in RAM into the parts of new nodes, and from files into RAM. Blocking."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from warmkv_server.kv import blockfile
from warmkv_server.kv.arrays import allocate, view
from warmkv_server.kv.blockfile import BadFile, BlockInfo
from warmkv_server.kv.files import Files, read_exactly
from warmkv_server.kv.index import Part
from warmkv_server.kv.types import Fallback, Growth, PartKind, Reuse, Tensors, TensorSpec

_FIRST_READ = 16 << 10
"""Bytes; the header and more."""
_CHUNK = 1 << 20
"""Bytes read at a time and hashed while the processor's cache still has them."""


@dataclass(frozen=True)
class Words:
    """The KV of one context as a request holds it: what was loaded, and what was computed behind it."""

    reuse: Reuse
    growth: Growth | None

    def copy(self, kind: PartKind, start: int, end: int, specs: Sequence[TensorSpec]) -> dict[str, mx.array]:
        """New arrays of the tokens [start, end), or of the snapshot taken after `end` tokens."""
        made: dict[str, mx.array] = {}
        for spec in specs:
            made[spec.name], target = allocate(spec, end - start)
            if kind is PartKind.STATE:
                target[...] = view(self._snapshot(end)[spec.name])
                continue
            done = start
            for first, last, tensors in self._pieces(kind):
                low, high = max(first, done), min(last, end)
                if low == done and low < high:
                    source = view(tensors[spec.name])
                    target[:, :, low - start : high - start] = source[:, :, low - first : high - first]
                    done = high
            if done != end:
                raise LookupError(f"no {kind} words of tokens {done} to {end}")
        return made

    def _pieces(self, kind: PartKind) -> Iterator[tuple[int, int, Tensors]]:
        for span in self.reuse.spans:
            if kind in span.parts:
                yield span.start, min(span.end, self.reuse.length), span.parts[kind]
        if self.growth is not None and kind in self.growth.tensors:
            yield self.growth.start, self.growth.end, self.growth.tensors[kind]

    def _snapshot(self, length: int) -> Tensors:
        if self.growth is not None and length in self.growth.snapshots:
            return self.growth.snapshots[length]
        last = self.reuse.spans[-1]
        if last.end != length:
            raise LookupError(f"no snapshot after {length} tokens")
        return last.parts[PartKind.STATE]


def write_part(files: Files, path: Path, info: BlockInfo, specs: Sequence[TensorSpec], tensors: Tensors) -> Part:
    """Write one block file, synced and under its name; the folder isn't synced yet.

    Raises:
        OSError: the disk refused.
    """
    payload = [blockfile.flat(view(tensors[spec.name])) for spec in specs]
    head = blockfile.header(info, specs)
    digest = blockfile.seal(head, payload)
    return Part(files.write(path, [memoryview(head), *payload]), digest)


def read_part(path: Path, info: BlockInfo, specs: Sequence[TensorSpec], digest: str) -> dict[str, mx.array]:
    """Read one block file straight into new arrays, and check that it is whole and the one that was asked for.

    Args:
        digest: the checksum that the index has.

    Raises:
        BadFile: missing, damaged, or another one.
        OSError: it can't be read now.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BadFile(Fallback.MISSING_BLOCK, "missing") from error
    try:
        try:
            return _read(fd, info, specs, digest)
        except BadFile as bad:
            if not _is_whole(fd):
                raise BadFile(Fallback.CHECKSUM, f"damaged: {bad}") from bad
            raise
    finally:
        os.close(fd)


def _read(fd: int, info: BlockInfo, specs: Sequence[TensorSpec], digest: str) -> dict[str, mx.array]:
    size = os.fstat(fd).st_size
    first = os.pread(fd, _FIRST_READ, 0)
    start = blockfile.header_size(first, size)
    head = first[:start] if start <= len(first) else os.pread(fd, start, 0)
    parsed = blockfile.parse(head)
    blockfile.expect(parsed, info, specs)
    if start + parsed.payload != size:
        raise BadFile(Fallback.FORMAT, f"{size} bytes instead of {start + parsed.payload}")
    hasher = blockfile.begin_checksum(head)
    made: dict[str, mx.array] = {}
    offset = start
    for spec in specs:
        made[spec.name], target = allocate(spec, info.count)
        buffer = blockfile.flat(target)
        for at in range(0, len(buffer), _CHUNK):
            piece = buffer[at : at + _CHUNK]
            try:
                read_exactly(fd, piece, offset)
            except EOFError as error:
                raise BadFile(Fallback.FORMAT, "cut off while it was read") from error
            hasher.update(piece)
            offset += len(piece)
    if not hasher.hexdigest() == parsed.digest == digest:
        raise BadFile(Fallback.CHECKSUM, "the checksum is another")
    return made


def verify_file(path: Path) -> blockfile.Parsed:
    """Read a whole block file and check it against itself, whatever model it is of.

    Raises:
        BadFile, OSError
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
