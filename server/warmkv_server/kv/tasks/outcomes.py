"""What finished requests have answered, by tenant and request id.

The newest are in RAM, up to a bound of bytes. Older ones are in the journal alone, until their time is up: whoever asks
for one waits for a look at it. What the journal doesn't have, because the disk refused the commit that it belongs to,
stays in RAM until it does.
"""

from __future__ import annotations

from collections.abc import Iterable

from warmkv_server.errors import StorageUnavailable
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.catalog.database import Statement
from warmkv_server.kv.catalog.journal import Journal
from warmkv_server.kv.catalog.stored_outcomes import KeptOutcome, StoredOutcomes
from warmkv_server.kv.index.index import Agent
from warmkv_server.kv.index.records import RequestOutcome

_SWEEP_SECONDS = 60.0
"""How late an outcome that only the journal has may be removed."""


class Outcomes:
    """Used on the event loop's thread.

    Attributes:
        nbytes: in RAM, without what is owed.
        owed_bytes: in RAM, of what the journal doesn't have.
    """

    def __init__(self, journal: Journal, limit: int, stored: StoredOutcomes) -> None:
        """
        Args:
            limit: bytes in RAM of what the journal has, too.
        """
        self._journal = journal
        self._limit = limit
        self._rest = stored.rest
        self._kept: dict[tuple[str, str], KeptOutcome] = {}
        self._owed: dict[tuple[str, str], tuple[KeptOutcome, Agent]] = {}
        self.nbytes = 0
        self.owed_bytes = 0
        for kept in stored.newest:
            self.add(kept)

    async def find(self, tenant: str, request_id: str) -> RequestOutcome | None:
        """What the request of this id answered. Doesn't wait unless RAM has no room for all.

        Raises:
            StorageUnavailable: it can't be looked up.
        """
        key = tenant, request_id
        kept = self._kept.get(key) or (self._owed[key][0] if key in self._owed else None)
        if kept is not None or self._rest is None:
            return None if kept is None else kept.outcome
        try:
            found = await self._journal.query(*rows.find_outcome(tenant, request_id))
        except OSError as error:
            raise StorageUnavailable(
                "the disk doesn't tell whether this request_id was used before", request_id=request_id
            ) from error
        return RequestOutcome(request_id, *found[0]) if found else None

    def add(self, kept: KeptOutcome) -> None:
        """The journal has it."""
        before = self._kept.pop(kept.key, None)  # An id that was forgotten and used again, in the journal twice.
        self.nbytes -= before.nbytes if before is not None else 0
        self._kept[kept.key] = kept
        self.nbytes += kept.nbytes
        while self.nbytes > self._limit:
            oldest = self._kept.pop(next(iter(self._kept)))
            self.nbytes -= oldest.nbytes
            first, last = self._rest or (oldest.time, oldest.time)
            self._rest = min(first, oldest.time), max(last, oldest.time)

    def owe(self, kept: KeptOutcome, agent: Agent) -> None:
        """The journal doesn't have it yet, nor the commit of this agent that it belongs to."""
        self._owed[kept.key] = kept, agent
        self.owed_bytes += kept.nbytes

    def owed_by(self, agent: Agent) -> list[KeptOutcome]:
        return [kept for kept, owner in self._owed.values() if owner is agent]

    def paid(self, owed: Iterable[KeptOutcome]) -> None:
        """The journal has these now."""
        for kept in owed:
            if self._owed.pop(kept.key, None) is not None:
                self.owed_bytes -= kept.nbytes
                self.add(kept)

    def forget(self, before: float) -> list[Statement]:
        """Let go of those older than this time; what the journal is to do about its own."""
        due = False
        while self._kept and (oldest := next(iter(self._kept.values()))).time < before:
            due = True
            self.nbytes -= self._kept.pop(oldest.key).nbytes
        for key in [key for key, (kept, _) in self._owed.items() if kept.time < before]:
            self.owed_bytes -= self._owed.pop(key)[0].nbytes
        if self._rest is not None and self._rest[0] < before - _SWEEP_SECONDS:
            self._rest = None if self._rest[1] < before else (before, self._rest[1])
            return [rows.delete_outcomes(before)]
        return [rows.delete_outcomes(before)] if due else []
