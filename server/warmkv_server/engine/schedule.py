"""Who runs next: admission, and whose prefill gets the next chunk."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from warmkv_server.engine.layout import CacheMap
from warmkv_server.engine.sequence import Sequence
from warmkv_server.engine.types import Job
from warmkv_server.kv.types import PartKind


def cost(job: Job, cache_map: CacheMap) -> int:
    """Bytes that a job takes in flight at most: the caches attention reads, and the words of its new tokens beside."""
    length = len(job.tokens) + (job.answer.max_tokens if job.answer is not None else 0)
    layout = cache_map.layout
    words = layout.nbytes(PartKind.APPEND) + layout.nbytes(PartKind.WINDOW)
    return cache_map.live_bytes(length) + words * (length - job.reuse.length)


@dataclass
class Schedule:
    """Waiting and prefilling sequences.

    Attributes:
        max_running: sequences prefilling or decoding at once.
        budget: bytes in flight of all of them.
    """

    max_running: int
    budget: int
    waiting: deque[Sequence] = field(default_factory=deque)
    prefilling: list[Sequence] = field(default_factory=list)
    _turn: int = 0

    def admit(self, running: int, bytes_in_flight: int) -> Sequence | None:
        """The next waiting sequence, in order of arrival, if there is room for it now.

        One for which memory ran out has its second try alone.
        """
        if not self.waiting or running >= self.max_running:
            return None
        first = self.waiting[0]
        if running and (first.rewound or bytes_in_flight + first.cost > self.budget):
            return None
        self.prefilling.append(self.waiting.popleft())
        return first

    def pick(self) -> Sequence | None:
        """Whose prefill gets the next chunk.

        The one with the least left, so that an agent that comes back with thirty new tokens doesn't wait for another's
        thirty thousand; every second time the one that came first, so that nobody starves.
        """
        if not self.prefilling:
            return None
        self._turn += 1
        if self._turn % 2 == 0:
            return self.prefilling[0]
        return min(self.prefilling, key=lambda sequence: sequence.prefill_end - sequence.done)
