"""Keeping freed memory in the process while there is work, where the C library is glibc.

KV comes and goes in blocks of megabytes. By default glibc gives such memory back to the system when it is freed, and
the system clears every page of it again before the next block can have it, which takes many times as long as reading
the block (`warmkv eval store --parts load`: "fresh" against "kept").
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
KEPT_BYTES = (1 << 31) - 1
"""Free memory at the end of the heap that stays with the process; the most that glibc can be told."""
_LARGEST = 32 << 20
"""Pieces above this size still come from the system and go back to it; glibc takes no higher limit."""

_LATER_SECONDS = 20.0

_kept = False


class _Later:
    """Gives memory back some seconds after something large came, and once more if more came meanwhile.

    What comes just before the first time is still in use then: without the second, it would stay for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits = self._more = False

    def ask(self) -> None:
        with self._lock:
            self._more = self._waits
            if not self._waits:
                self._wait()

    def _wait(self) -> None:
        self._waits, self._more = True, False
        timer = threading.Timer(_LATER_SECONDS, self._give_back)
        timer.daemon = True
        timer.start()

    def _give_back(self) -> None:
        give_back()
        with self._lock:
            self._waits = False
            if self._more:
                self._wait()


_later = _Later()


def keep_freed_memory() -> bool:
    """Have freed blocks reused. Whether it could be arranged; does nothing if the operator has set malloc up.

    Call it before any thread is started: threads that have got heaps of their own keep them.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    global _kept
    mallopt = ctypes.CDLL(None).mallopt
    chosen = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, KEPT_BYTES))
    done = [mallopt(parameter, value) for parameter, value in chosen]
    _kept = all(done)
    return _kept


def give_back() -> None:
    """Return what is free to the system after all, if it was kept. Blocking: a tenth of a second for a gigabyte."""
    if _kept:
        ctypes.CDLL(None).malloc_trim(0)


def give_back_later() -> None:
    """The same a while after something large has come, when it is likely to be gone again. From any thread; cheap."""
    if _kept:
        _later.ask()
