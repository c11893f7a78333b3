"""The outcomes of requests as the journal has them."""

from __future__ import annotations

from dataclasses import dataclass

from warmkv_server.kv.catalog import rows
from warmkv_server.kv.catalog.database import Database
from warmkv_server.kv.index.records import RequestOutcome

_OVERHEAD_BYTES = 500
"""Of an outcome in RAM, besides its payload and its id."""


@dataclass(frozen=True)
class KeptOutcome:
    """
    Attributes:
        time: of the commit, in seconds since 1970.
    """

    tenant: str
    outcome: RequestOutcome
    time: float

    @property
    def key(self) -> tuple[str, str]:
        """Tenant and request id."""
        return self.tenant, self.outcome.request_id

    @property
    def nbytes(self) -> int:
        return len(self.outcome.payload) + len(self.outcome.request_id) + _OVERHEAD_BYTES


@dataclass(frozen=True)
class StoredOutcomes:
    """What the journal has at the start of a server.

    Attributes:
        newest: as many as may be in RAM, oldest first.
        rest: time of the oldest and of the newest of the others, if there are any.
    """

    newest: list[KeptOutcome]
    rest: tuple[float, float] | None

    @classmethod
    def read(cls, database: Database, limit: int) -> StoredOutcomes:
        """Blocking.

        Args:
            limit: bytes.
        """
        first, rest = 0, []
        for row, nbytes, time in rows.read_outcome_sizes(database):
            limit -= nbytes + _OVERHEAD_BYTES
            if limit >= 0:
                first = row
            else:
                rest.append(time)
        newest = [KeptOutcome(*found) for found in rows.read_outcomes(database, first)] if first else []
        return cls(newest, (min(rest), max(rest)) if rest else None)
