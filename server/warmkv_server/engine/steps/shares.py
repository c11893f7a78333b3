"""How tenants share what runs at once: rows of the batch and bytes of memory.

A tenant alone has all of it. Where others ask too, each may have an equal share, and one that has more gives way: its
latest sequences go back to the head of its line, with the words of what they have computed, and go on later.

A tenant's part is the larger of its part of the rows and its part of the bytes (dominant resource fairness: Ghodsi et
al., NSDI 2011). Another's sequence takes its place at once where the other has no more than it has afterwards. Where
the two can't run beside each other, such as in a batch of one or in memory that one of them fills, they take turns by
the time that they have had: the part, summed over seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Sequences

from warmkv_server.engine.steps.sequence import Sequence

TURN_SECONDS = 1.0
"""Of everything the engine has: by so much one tenant may be ahead of another before it gives way to it. One that comes
is that much behind the first of those who are there, at most; one that stays, twice as much."""

GRACE_SECONDS = 0.25
"""A sequence that has just come in is left alone for so long, where tenants take turns."""


class Shares:
    """What each tenant has now, and has had.

    Args:
        max_running: rows.
        budget: bytes.
    """

    def __init__(self, max_running: int, budget: int) -> None:
        self._max_running = max_running
        self._budget = budget
        self._had: dict[str, float] = {}
        self._asking: set[str] = set()
        self._noted: float | None = None

    def note(self, running: Sequences[Sequence], asking: Iterable[str], now: float) -> None:
        """Account for the time since the last call, in which these ran. `asking` are the tenants with any sequence."""
        seconds, self._noted = now - (now if self._noted is None else self._noted), now
        for tenant, part in self.parts(running).items():
            self._had[tenant] = self._had.get(tenant, 0.0) + part * seconds
        came, self._asking = set(asking) - self._asking, set(asking)
        most = max((self._had.get(tenant, 0.0) for tenant in self._asking - came), default=0.0)
        for tenant in self._asking:
            had = self._had.get(tenant, 0.0)
            if tenant in came:
                had = min(max(had, most - TURN_SECONDS), most + TURN_SECONDS)
            self._had[tenant] = max(had, most - 2 * TURN_SECONDS)

    def parts(self, running: Iterable[Sequence], parked: Iterable[Sequence] = ()) -> dict[str, float]:
        """The part of each tenant that runs these, and holds the words of those."""
        rows: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for sequence in running:
            rows[sequence.tenant] += 1
            held[sequence.tenant] += sequence.need.held
        for sequence in parked:
            held[sequence.tenant] += sequence.parked_bytes
        return {tenant: max(rows[tenant] / self._max_running, held[tenant] / self._budget) for tenant in held}

    @property
    def equal(self) -> float:
        """The part that each of those who ask may have."""
        return 1 / max(1, len(self._asking))

    def is_behind(self, tenant: str, other: str) -> bool:
        """Whether a tenant has had so much less than another that its turn has come."""
        return self._had.get(tenant, 0.0) + TURN_SECONDS <= self._had.get(other, 0.0)
