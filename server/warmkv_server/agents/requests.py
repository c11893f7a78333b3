"""Retries that do nothing twice: one run for each request id, joined while it runs and replayed when it is over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from warmkv_server.agents.run import Run
from warmkv_server.agents.types import AgentKey, Identity
from warmkv_server.errors import RequestIdReused
from warmkv_server.kv.store import AgentRecord, RequestOutcome

Event = TypeVar("Event")
Kept = TypeVar("Kept")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Recorder(Generic[Kept, Event]):
    """How one kind of request is kept: what is written at its commit, and the run that this makes again.

    Attributes:
        kept: (de)serialises what is written.
        replay: a run that is over, from what was written.
    """

    kept: TypeAdapter[Kept]
    replay: Callable[[Kept], Run[Event]]

    def outcome(self, identity: Identity, value: Kept) -> RequestOutcome:
        return RequestOutcome(identity.request_id, identity.body_hash, self.kept.dump_json(value))


class Sealed(Generic[Result]):
    """A request's result, made once: a retry gets to the last digit what the first call got.

    The store calls it inside the commit, where the result has to be written; whoever answers the client asks for
    `result` afterwards.

    Args:
        make: the result from the agent after the commit, and whether that is durable.
        write: what to keep of it; None for a request without an id.
    """

    def __init__(
        self, make: Callable[[AgentRecord, bool], Result], write: Callable[[Result], RequestOutcome] | None
    ) -> None:
        self._make = make
        self._write = write
        self._made: tuple[bool, Result] | None = None

    @property
    def request(self) -> Callable[[AgentRecord, bool], RequestOutcome] | None:
        """What the commit takes."""
        return self._seal if self._write is not None else None

    def result(self, agent: AgentRecord, persisted: bool) -> Result:
        # The transaction itself may be what the disk refused, after the result was made for it.
        if self._made is not None and self._made[0] == persisted:
            return self._made[1]
        return self._make(agent, persisted)

    def _seal(self, agent: AgentRecord, persisted: bool) -> RequestOutcome:
        assert self._write is not None
        result = self._make(agent, persisted)
        self._made = persisted, result
        return self._write(result)


class Requests:
    """The running requests that have an id, and those that are over.

    Args:
        kept: finds what was written of a request that is over, by tenant and request id.
    """

    def __init__(self, kept: Callable[[str, str], RequestOutcome | None]) -> None:
        self._kept = kept
        self._running: dict[tuple[str, str], tuple[Identity, Run[Any]]] = {}

    async def run_once(
        self,
        key: AgentKey,
        identity: Identity | None,
        recorder: Recorder[Any, Event],
        begin: Callable[[], Run[Event]],
    ) -> Run[Event]:
        """The run of this request: a new one, the one that still runs, or a replay.

        Raises:
            RequestIdReused: if the id was used for another request.
        """
        if identity is None:
            return begin()
        name = (key.tenant, identity.request_id)
        while name in self._running:
            known, run = self._running[name]
            _require_same(known.body_hash, identity)
            if run.stopped is None:
                return run
            # It is being cancelled. What it leaves, if anything, is in the store once it is over.
            await run.over.wait()
        outcome = self._kept(key.tenant, identity.request_id)
        if outcome is not None:
            _require_same(outcome.body_hash, identity)
            return recorder.replay(recorder.kept.validate_json(outcome.payload))
        run = begin()
        self._running[name] = identity, run
        run.when_over(lambda: self._running.pop(name))
        return run


def _require_same(body_hash: bytes, identity: Identity) -> None:
    if body_hash != identity.body_hash:
        raise RequestIdReused(
            f"request_id {identity.request_id!r} was used for another request; use a new id for a new request"
        )
