"""Every way in which the store changes the block files: one small class, so that a test can stand in for the disk.

The order that survives a power cut is: a new name for the content, the content on the medium, then the final name,
then the folder on the medium. `Files.write` and `Files.sync_folders` are the two halves of it; the transaction that
makes the file count comes after both.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from warmkv_server.contract.store import Durability

P = ParamSpec("P")
T = TypeVar("T")

TEMP_SUFFIX = ".tmp"
_IOV = 512
"""Buffers handed to one system call; below every system's limit."""
_PIECE_BYTES = 256 << 10
_PAUSE_SECONDS = 1e-4
"""Copying megabytes into the page cache is work inside the system, which gives a processor to another thread only after
some milliseconds, unless it is left free now and then: the event loop, which sends the tokens, would wait as long."""


class Files:
    """Thread-safe.

    Attributes:
        headroom_bytes: free space of the filesystem that new files leave alone.
        busy: whether somebody decodes: then content is written in pieces, with pauses. Called from any thread.
    """

    def __init__(
        self, durability: Durability, headroom_bytes: int = 0, busy: Callable[[], bool] = lambda: False
    ) -> None:
        self.durability = durability
        self.headroom_bytes = headroom_bytes
        self.busy = busy
        self._numbers = itertools.count()

    def write(self, path: Path, buffers: Sequence[memoryview]) -> int:
        """Put a whole file in place, content synced, under its final name. Returns its size.

        Raises:
            OSError: the disk refused. Nothing but perhaps a stray temp file is left.
        """
        size = sum(len(b) for b in buffers)
        self._check_room(path.parent, size)
        temp = path.with_name(f"{path.name}.{next(self._numbers)}{TEMP_SUFFIX}")
        fd = self.create(temp)
        try:
            try:
                self.fill(fd, buffers)
                self.sync(fd)
            finally:
                os.close(fd)
            self.rename(temp, path)
        except BaseException:
            self._discard(temp)
            raise
        return size

    def sync_folders(self, folders: Iterable[Path]) -> None:
        """Make the names in these folders durable."""
        if self.durability is Durability.NONE:
            return
        for folder in folders:
            self.sync_folder(folder)

    # The steps, one system call each.

    def create(self, path: Path) -> int:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)  # Whatever the umask takes away.
        except BaseException:
            os.close(fd)
            raise
        return fd

    def fill(self, fd: int, buffers: Sequence[memoryview]) -> None:
        rest = [b for b in buffers if len(b)]
        while rest:
            busy = self.busy()
            written = os.writev(fd, _first(rest, _PIECE_BYTES) if busy else rest[:_IOV])
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            if written:
                rest[0] = rest[0][written:]
            if busy and rest:
                time.sleep(_PAUSE_SECONDS)

    def sync(self, fd: int) -> None:
        if self.durability is Durability.NONE:
            return
        if self.durability is Durability.FULL and sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def sync_data(self, fd: int) -> None:
        """`sync` for a file that has its length already: what it says is to be on the medium, not when it said so."""
        if self.durability is Durability.NONE or sys.platform == "darwin":
            self.sync(fd)
        else:
            os.fdatasync(fd)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, unless somebody has it."""
        with contextlib.suppress(FileExistsError):
            os.link(source, target)

    def sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.sync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _discard(self, temp: Path) -> None:
        with contextlib.suppress(OSError):  # The start of the next server sweeps it.
            self.unlink(temp)

    def _check_room(self, folder: Path, size: int) -> None:
        if not self.headroom_bytes:
            return
        volume = os.statvfs(folder)
        if volume.f_bavail * volume.f_frsize < size + self.headroom_bytes:
            raise OSError(errno.ENOSPC, "the filesystem's free space is down to the headroom", str(folder))


def _first(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The first so many bytes of them, in as many buffers as one system call takes."""
    taken: list[memoryview] = []
    for buffer in buffers[:_IOV]:
        taken.append(buffer[:nbytes])
        nbytes -= len(taken[-1])
        if not nbytes:
            break
    return taken


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, if it is one that can be read."""
    try:
        with os.scandir(folder) as found:
            yield from found
    except OSError:
        return


def is_plain(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file in its own place: no link, no folder, no pipe, no device."""
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def read_file(path: Path, limit: int) -> bytes:
    """A plain file's content. Whatever else has the name is neither followed nor waited for.

    Raises:
        OSError: also where it isn't a plain file, or longer than the limit.
    """
    fd = open_file(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes are too many", str(path))
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(limit)
    finally:
        os.close(fd)


def open_file(path: Path, *, follow: bool = False) -> int:
    """A descriptor to read a plain file from.

    Args:
        follow: a link may lead to it.

    Raises:
        OSError: also where it isn't one.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return fd


def open_private(path: Path, flags: int) -> int:
    """A descriptor of a file that only its owner can use; made where there is none, whatever the umask takes away.

    Raises:
        OSError: also where a link has the name.
    """
    fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # somebody else's
        os.fchmod(fd, 0o600)
    return fd


def in_words(path: Path) -> str:
    """A path as people can read it, whatever bytes are in it."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class InFlight:
    """File operations that have not returned yet, and since when: a disk that is dead never says so. Thread-safe."""

    def __init__(self) -> None:
        self._began: dict[int, float] = {}

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something that uses files, on this thread."""
        self._began[threading.get_ident()] = time.monotonic()
        try:
            return work(*args, **kwargs)
        finally:
            del self._began[threading.get_ident()]

    def longest(self) -> float:
        """Seconds that the oldest of them has been at work; 0 if there is none."""
        began = list(self._began.values())
        return time.monotonic() - min(began) if began else 0.0
