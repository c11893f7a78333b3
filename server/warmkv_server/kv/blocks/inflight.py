"""File operations that have not returned yet, and since when: a disk that is dead never says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class InFlight:
    """Thread-safe."""

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
