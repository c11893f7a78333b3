"""Scheduling: admission to the running set, preemption by tenants' shares, and whose prefill gets the next chunk.

A tenant alone has all that runs at once, rows of the batch and bytes of memory. Where others ask too, each may have an
equal share, and one that has more gives way: its latest sequences go back to the head of its line, with the words of
what they have computed, and go on later.

A tenant's part is the larger of its part of the rows and its part of the bytes (dominant resource fairness: Ghodsi et
al., NSDI 2011). Another's sequence takes its place at once where the other has no more than it has afterwards. Where
the two can't run beside each other, such as in a batch of one or in memory that one of them fills, they take turns by
the time that they have had: the part, summed over seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

from warmkv_server.contract.fairness import FairLine
from warmkv_server.engine.model.memory_need import MemoryNeed
from warmkv_server.engine.steps.batch import PADDING, little_padding
from warmkv_server.engine.steps.sequence import Sequence

TURN_SECONDS = 1.0
"""Of everything the engine has: by so much one tenant may be ahead of another before it gives way to it. One that comes
is that much behind the first of those who are there, at most; one that stays, twice as much."""

GRACE_SECONDS = 0.25
"""A sequence that has just come in is left alone for so long, where tenants take turns."""


def together(needs: Sequences[MemoryNeed], sharing: Sequences[MemoryNeed] = ()) -> int:
    """Bytes that requests take at most while they run beside each other. Rows of a batch are padded to one length.

    Args:
        sharing: of those among them whose prompts are prefilled in one chunk, for which they become a batch.
    """
    if not needs:
        return 0
    alone = len(needs) == 1
    share = 1.0 if alone else 1 - PADDING
    copied = 0 if alone else sum(need.copied for need in needs)
    steps = max(need.step for need in needs)
    chunk = sum(need.step for need in sharing)
    return int(sum(need.held for need in needs) / share + max(copied / share + chunk, steps))


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


@dataclass
class Schedule:
    """Waiting and prefilling sequences.

    Attributes:
        max_running: sequences prefilling or decoding at once.
        budget: bytes that all of them may take together, with the words of those that gave way.
        giving_way: those that `admit` has put others in the place of, and that are to be parked now.
    """

    max_running: int
    budget: int
    waiting: FairLine[Sequence] = field(default_factory=FairLine)
    prefilling: list[Sequence] = field(default_factory=list)
    giving_way: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shares = Shares(self.max_running, self.budget)
        self._turn = 0
        self._chunks = 0
        self._last_chunk: dict[str, int] = {}

    def admit(self, running: Sequences[Sequence], now: float) -> Sequence | None:
        """The next waiting sequence, if there is room for it now, or if others give way to it: see `giving_way`.

        Tenants take turns, each in order of arrival. What doesn't fit holds up its own tenant's, and those of tenants
        that have had more. One for which memory ran out has its second try alone.

        Args:
            running: all that wait no longer, without those that give way.
            now: on `time.perf_counter`.
        """
        parts = self.shares.parts(running)
        asking = self.waiting.tenants() | parts.keys()
        held_up: set[str] = set()
        for tenant, first in self.waiting.firsts(lambda tenant: parts.get(tenant, 0.0)):
            if running and (first.rewound and not first.parked):
                return None
            if running and tenant in held_up:
                continue
            giving_way = self._room_for(first, running, now)
            if giving_way is not None:
                self.giving_way += giving_way
                self.prefilling.append(self.waiting.take(first))
                first.came = now
                return first
            held_up |= {other for other in asking if self.shares.is_behind(tenant, other)}
        return None

    def parked(self) -> list[Sequence]:
        """Those that wait with the words of what they have computed, or are about to."""
        return [*self.giving_way, *(sequence for sequence in self.waiting if sequence.parked)]

    def _room_for(self, first: Sequence, running: Sequences[Sequence], now: float) -> list[Sequence] | None:
        """Those that give way so that it fits, perhaps nobody; None if it can't come in now."""
        left, giving_way = list(running), list[Sequence]()
        parked = [sequence for sequence in self.parked() if sequence is not first]
        while not self._fits(first, left, parked):
            sequence = self._gives_way(first, left, parked, now)
            if sequence is None:
                return None
            left.remove(sequence)
            giving_way.append(sequence)
            parked.append(sequence)
        return giving_way

    def _fits(self, first: Sequence, running: Sequences[Sequence], parked: Sequences[Sequence]) -> bool:
        if len(running) >= self.max_running:
            return False
        needed = together([first.need, *(sequence.need for sequence in running)])
        return needed + sum(sequence.parked_bytes for sequence in parked) <= self.budget

    def _gives_way(
        self, first: Sequence, running: Sequences[Sequence], parked: Sequences[Sequence], now: float
    ) -> Sequence | None:
        """The one that gives way next: the latest of the tenant that has most, if that is fair."""
        parts = self.shares.parts(running, parked)
        has = parts.get(first.tenant, 0.0)
        will_have = self.shares.parts([*running, first], parked)[first.tenant]
        others = {sequence.tenant for sequence in running} - {first.tenant}
        for tenant in sorted(others, key=lambda tenant: -parts[tenant]):
            last = max((row for row in running if row.tenant == tenant), key=lambda row: row.ident)
            rest = self.shares.parts([row for row in running if row is not last], [*parked, last])
            beside = rest[tenant] >= will_have
            instead = (
                has < min(self.shares.equal, parts[tenant])
                and self.shares.is_behind(first.tenant, tenant)
                and now - last.came >= GRACE_SECONDS
            )
            if (beside or instead) and self._can_come_back([*parked, last]):
                return last
        return None

    def _can_come_back(self, parked: Sequences[Sequence]) -> bool:
        """Whether each of these fits alone, beside the words of the others. So somebody can always go on."""
        held = sum(sequence.parked_bytes for sequence in parked)
        return all(together([each.need]) + held - each.parked_bytes <= self.budget for each in parked)

    def mates(self, first: Sequence, running: Sequences[Sequence], most: int, tokens: int) -> list[Sequence]:
        """`first`, and those whose prompts can be prefilled in one chunk with its own: new agents' short ones.

        Args:
            running: all that wait no longer.
            most: tokens that each may have.
            tokens: that the chunk may have, padding included.
        """
        found = [first]
        if not _is_short(first, most):
            return found
        needs = [sequence.need for sequence in running]
        for sequence in self.prefilling:
            rows = [*found, sequence]
            lengths = [row.prefill_end for row in rows]
            if (
                sequence is not first
                and _is_short(sequence, most)
                and len(rows) * max(lengths) <= tokens
                and little_padding(lengths)
                and together(needs, [row.need for row in rows]) <= self.budget
            ):
                found = rows
        return found

    def pick(self, held_up: Callable[[str], bool]) -> Sequence | None:
        """Whose prefill gets the next chunk: tenants take turns.

        Of a tenant's own the one with the least left, so that an agent that comes back with thirty new tokens doesn't
        wait for another's thirty thousand; every second time the one that came first, so that nobody starves.

        Args:
            held_up: whether a tenant has to wait.
        """
        tenants = {sequence.tenant for sequence in self.prefilling}
        tenants = {tenant for tenant in tenants if not held_up(tenant)}
        if not tenants:
            return None
        tenant = min(tenants, key=lambda tenant: self._last_chunk.get(tenant, 0))
        self._chunks += 1
        self._last_chunk[tenant] = self._chunks
        own = [sequence for sequence in self.prefilling if sequence.tenant == tenant]
        self._turn += 1
        if self._turn % 2 == 0:
            return own[0]
        return min(own, key=lambda sequence: sequence.left)


def _is_short(sequence: Sequence, most: int) -> bool:
    """Whether it has not begun, has so few tokens, and its caches can all be cut, and so padded."""
    return (
        sequence.wants_token
        and sequence.left == sequence.prefill_end <= most
        and not (sequence.apart or sequence.rewound)
        and sequence.loaded.cache_map.can_be_cut
    )
