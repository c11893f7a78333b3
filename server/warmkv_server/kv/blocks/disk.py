"""The tier on a local disk: a file an object, spread over 256 folders by the first byte of the node's id.

A bad file goes to the quarantine, where it is kept for inspection; the oldest go first when there are too many bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from warmkv_server.kv.blocks.files import TEMP_SUFFIX, Files, entries, is_plain, open_file, read_file
from warmkv_server.kv.blocks.names import Name
from warmkv_server.kv.blocks.residency import drop_pages, resident_bytes
from warmkv_server.kv.blocks.tier import Tidied

BLOCKS = "blocks"
QUARANTINE = "quarantine"
OBJECT_LIMIT = 4 << 30
"""Bytes of an object at most."""


class DiskBlock:
    """A file that is open to be read; see `Block`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        found = os.fstat(fd)
        self.nbytes = found.st_size
        self.version = _version(found)

    def prefetch(self) -> None:
        if hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def read(self, at: int, nbytes: int) -> bytes:
        return os.pread(self._fd, nbytes, at)

    def read_into(self, memory: memoryview, at: int) -> int:
        return os.preadv(self._fd, [memory], at)

    def close(self) -> None:
        os.close(self._fd)


class DiskTier:
    """See `BlockTier`. Every change goes through `Files`."""

    def __init__(self, data_dir: Path, files: Files, quarantine_limit: int) -> None:
        """
        Args:
            quarantine_limit: bytes.
        """
        self._data_dir = data_dir
        self._files = files
        self._limit = quarantine_limit

    def path(self, name: str) -> Path:
        return object_path(self._data_dir, name)

    def put(self, name: str, buffers: Sequence[memoryview]) -> int:
        return self._files.write(self.path(name), buffers)

    def sync(self, names: Iterable[str]) -> None:
        self._files.sync_folders(sorted({self.path(name).parent for name in names}))

    def open(self, name: str) -> DiskBlock:
        return open_block(self.path(name))

    def get(self, name: str) -> bytes:
        return read_file(self.path(name), OBJECT_LIMIT)

    def delete(self, name: str) -> None:
        self._files.unlink(self.path(name))

    def list(self) -> Iterator[tuple[str, int]]:
        for entry in block_files(self._data_dir):
            if is_object(entry):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False).st_size

    def tidy(self) -> Tidied:
        removed, strange = 0, []
        for entry in block_files(self._data_dir):
            if is_plain(entry) and entry.name.endswith(TEMP_SUFFIX):
                self._files.unlink(Path(entry.path))
                removed += 1
            elif not is_object(entry):
                strange.append(Path(entry.path))
        strange += [Path(e.path) for e in entries(self._data_dir / BLOCKS) if not _is_block_folder(e)]
        return Tidied(removed, tuple(strange))

    def set_aside(self, name: str, version: object) -> int:
        path = self.path(name)
        with contextlib.suppress(FileNotFoundError):
            if _version(path.lstat()) != version:
                return quarantined_bytes(self._data_dir)
        return quarantine(self._files, path, self._data_dir / QUARANTINE, self._limit)

    def resident_bytes(self, names: Iterable[str]) -> int:
        return resident_bytes(self.path(name) for name in names)

    def drop_pages(self, names: Iterable[str]) -> None:
        drop_pages(self.path(name) for name in names)


def object_path(data_dir: Path, name: str) -> Path:
    """Where the file of an object is."""
    return data_dir.joinpath(BLOCKS, name[:2], name)


def open_block(path: Path) -> DiskBlock:
    """
    Raises:
        OSError
    """
    return DiskBlock(open_file(path))


def block_files(data_dir: Path) -> Iterator[os.DirEntry[str]]:
    """Everything that lies in the folders of blocks."""
    for folder in sorted(Path(entry.path) for entry in entries(data_dir / BLOCKS)):
        yield from entries(folder)


def is_object(entry: os.DirEntry[str]) -> bool:
    """Whether it has the name of an object, in the folder where that belongs, and is a file."""
    return Name.parse(entry.name) is not None and Path(entry.path).parent.name == entry.name[:2] and is_plain(entry)


def _is_block_folder(entry: os.DirEntry[str]) -> bool:
    return len(entry.name) == 2 and set(entry.name) <= set("0123456789abcdef") and entry.is_dir()


def _version(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_mtime_ns


def quarantine(files: Files, path: Path, folder: Path, limit: int) -> int:
    """Move a file there. Blocking, from any thread. Returns the bytes that the folder holds afterwards."""
    target = folder / path.name
    number = 0
    while os.path.lexists(target):
        number += 1
        target = folder / f"{path.name}.{number}"
    with contextlib.suppress(FileNotFoundError):  # Somebody else may have moved it.
        files.rename(path, target)
    kept = sorted(_stats(folder), key=lambda found: found[1].st_mtime)
    total = sum(stat.st_size for _, stat in kept)
    for entry, stat in kept:
        if total <= limit:
            break
        files.unlink(entry)
        total -= stat.st_size
    return total


def quarantined_bytes(data_dir: Path) -> int:
    """Of the files in quarantine."""
    return sum(stat.st_size for _, stat in _stats(data_dir / QUARANTINE))


def _stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Those that are there; other threads take away too what is too much."""
    for entry in entries(folder):
        if is_plain(entry):
            with contextlib.suppress(FileNotFoundError):
                yield Path(entry.path), entry.stat(follow_symlinks=False)
