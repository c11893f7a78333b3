"""What of a file is in the operating system's page cache, and asking it to forget. Blocking."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

UNKNOWN = -1


def resident_bytes(paths: Iterable[Path]) -> int:
    """Bytes of these files in the page cache; -1 where the system doesn't tell. Missing files count nothing."""
    if sys.platform not in ("linux", "darwin"):
        return UNKNOWN
    libc = ctypes.CDLL(None, use_errno=True)
    total = 0
    for path in paths:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size:
                    total += _resident(libc, file.fileno(), size)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return UNKNOWN
    return total


def _resident(libc: ctypes.CDLL, fd: int, size: int) -> int:
    # A private writable mapping, because ctypes takes the address of writable memory only; nothing is written.
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        start = (ctypes.c_ubyte * size).from_buffer(mapped)
        try:
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), vector):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del start
        resident = sum(page & 1 for page in vector)
    return min(resident * mmap.PAGESIZE, size)


def drop_pages(paths: Iterable[Path]) -> None:
    """Ask the system to forget these files' pages, where it takes such requests."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
