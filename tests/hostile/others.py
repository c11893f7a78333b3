"""What others notice while somebody attacks: the longest time without an answer, and the memory that it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.harness import Client, Server, text

MIB = 1 << 20


@dataclass
class Seen:
    """What was seen during the block.

    Attributes:
        gaps: seconds of each of the others' calls.
        before: bytes of RAM of the server and its processes when the block began.
        most: the most of it.
    """

    before: int
    most: int = 0
    gaps: list[float] = field(default_factory=list)

    @property
    def longest(self) -> float:
        return max(self.gaps)

    @property
    def growth(self) -> int:
        return max(0, self.most - self.before)


@contextmanager
def watching(server: Server, token: str | None = None) -> Iterator[Seen]:
    """Call the server all the time, as somebody else, and look at its memory."""
    seen = Seen(resident(server.process.pid))
    over = threading.Event()

    def call() -> None:
        with Client(server.address, token=token) as client:
            while not over.is_set():
                began = time.perf_counter()
                client.count(text("hi"))
                seen.gaps.append(time.perf_counter() - began)

    def look() -> None:
        while not over.wait(0.01):
            seen.most = max(seen.most, resident(server.process.pid))

    threads = [threading.Thread(target=each) for each in (call, look)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def resident(pid: int) -> int:
    """Bytes of RAM of a process and of those that it started, what they share counted once."""
    return sum(_proportional(each) for each in family(pid))


def family(pid: int) -> list[int]:
    """A process and those that it started, and so on."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
