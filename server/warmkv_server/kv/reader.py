"""Reading block files: straight into new arrays, checked on the way. Blocking.

MLX makes an array of a file without clearing its memory first, and takes any object that reads like a file. The one it
gets here computes the checksum of each piece while the processor's cache still has it, so that every byte crosses the
memory bus once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from warmkv_server.kv import blockfile
from warmkv_server.kv.arrays import view
from warmkv_server.kv.blockfile import BadFile, BlockInfo
from warmkv_server.kv.types import Fallback, TensorSpec

_FIRST_READ = 16 << 10
"""Bytes; the header and more."""
_CHUNK = 256 << 10
"""Bytes read and hashed at a time: a fraction of a processor's second-level cache."""


def read_part(path: Path, info: BlockInfo, specs: Sequence[TensorSpec], digest: str) -> dict[str, mx.array]:
    """Read one block file, and check that it is whole and the one that was asked for.

    Args:
        digest: the checksum that the index has.

    Raises:
        BadFile: missing, damaged, or another one.
        OSError: it can't be read now.
    """
    fd = _open(path)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)  # All of it at once, not a little ahead of each chunk.
        try:
            return _read(_CheckedFile(fd, _expected_head(fd, info, specs, digest)), specs, digest)
        except BadFile as bad:
            if not _is_whole(fd):
                raise BadFile(Fallback.CHECKSUM, f"damaged: {bad}") from bad
            raise
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


class _CheckedFile(io.RawIOBase):
    """What MLX reads from: the header from memory, the payload from the file, hashed as it goes by.

    Nothing is raised at MLX, which has no way to hand it on; `complete` says afterwards whether all went well.
    """

    def __init__(self, fd: int, head: bytes) -> None:
        self._fd = fd
        self._head = head
        self._position = 0
        self._hashed = len(head)
        self._hasher = blockfile.begin_checksum(head)
        self.error: OSError | None = None
        self.complete = True

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._fd).st_size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        target = memoryview(buffer).cast("B")
        try:
            while len(target):
                target = target[self._read_some(target[:_CHUNK]) :]
        except OSError as error:
            self.error, self.complete = error, False
        except EOFError:
            self.complete = False
        return len(buffer)

    def _read_some(self, target: memoryview) -> int:
        if self._position < len(self._head):
            piece = self._head[self._position : self._position + len(target)]
            target[: len(piece)] = piece
            got = len(piece)
        else:
            got = os.preadv(self._fd, [target], self._position)
            if not got:
                raise EOFError
            if self._position == self._hashed:
                self._hasher.update(target[:got])
                self._hashed += got
        self._position += got
        return got

    def digest(self, payload: int, arrays: Sequence[mx.array]) -> str:
        """The checksum of the header and of what the arrays, in the file's order, hold."""
        if self._hashed == len(self._head) + payload:
            return self._hasher.hexdigest()
        # Another version of MLX may read in another order.
        return blockfile.checksum(self._head, (blockfile.flat(view(array)) for array in arrays))


def _read(file: _CheckedFile, specs: Sequence[TensorSpec], digest: str) -> dict[str, mx.array]:
    loaded: dict[str, mx.array] = mx.load(file, format="safetensors")  # type: ignore[arg-type,assignment]
    arrays = [loaded[spec.name] for spec in specs]
    for array in arrays:
        mx.eval(array)
    if file.error is not None:
        raise file.error
    payload = sum(int(array.nbytes) for array in arrays)
    if not file.complete:
        raise BadFile(Fallback.FORMAT, "cut off while it was read")
    if file.digest(payload, arrays) != digest:
        raise BadFile(Fallback.CHECKSUM, "the checksum is another")
    return loaded


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
