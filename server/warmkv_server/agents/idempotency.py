"""Idempotency: one run for each request id, joined by retries while it runs and replayed to them when it is over.

What is kept is what the client was sent, in the bytes of the messages, behind a header with the format's version. How
a message looks is the service's affair: it hands in a codec for each kind of answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from warmkv_server.agents.run import Run
from warmkv_server.agents.types import Identity, Recorded
from warmkv_server.contract.names import AgentKey
from warmkv_server.errors import OutcomeUnreadable, RequestCancelled, RequestIdReused
from warmkv_server.kv.store import AgentRecord, OutcomeOf, RequestOutcome

EventT = TypeVar("EventT")
Result = TypeVar("Result")

_FORMAT = b"\x01"
"""First byte of what is kept. The second is 1 if the request was cancelled, else 0; then come the messages, each behind
its length in four bytes, little-endian. The format before this one was JSON, which begins with a brace."""


@dataclass(frozen=True)
class ResponseCodec(Generic[EventT]):
    """How one kind of request's answers are kept.

    Attributes:
        encode: the bytes of each message that an event sends.
        decode: what `encode` gave, as it was; raises ValueError for other bytes.
    """

    encode: Callable[[EventT], Sequence[bytes]]
    decode: Callable[[bytes], Recorded]

    def outcome(self, identity: Identity, events: Sequence[EventT], *, cancelled: bool = False) -> RequestOutcome:
        """What is to be kept of a request that has sent these events, or would have."""
        payload = bytearray(_FORMAT + bytes([cancelled]))
        for event in events:
            for message in self.encode(event):
                payload += len(message).to_bytes(4, "little") + message
        return RequestOutcome(identity.request_id, identity.body_hash, bytes(payload))

    def replay(self, outcome: RequestOutcome) -> Run[Any]:
        """A run that is over, from what was kept.

        Raises:
            OutcomeUnreadable
        """
        try:
            events = [self.decode(message) for message in _messages(outcome.payload)]
        except ValueError as error:
            raise OutcomeUnreadable(
                f"the request {outcome.request_id!r} was done, and nothing was done again, but its answer was kept by "
                f"another version of WarmKV ({error}); see what the agent has with GetAgent, and use a new request_id",
                request_id=outcome.request_id,
            ) from error
        cancelled = RequestCancelled("the call with this request_id was cancelled", request_id=outcome.request_id)
        return Run.replay("a kept answer", events, cancelled if outcome.payload[1] else None)


@dataclass(frozen=True)
class ResponseCodecs:
    """One for each kind of answer."""

    prime: ResponseCodec[Any]
    extend: ResponseCodec[Any]
    generate: ResponseCodec[Any]
    fork: ResponseCodec[Any]


def _messages(payload: bytes) -> Iterator[bytes]:
    if payload[:1] != _FORMAT or payload[1:2] not in (b"\0", b"\1"):
        raise ValueError("in another format")
    at = 2
    while at < len(payload):
        end = at + 4 + int.from_bytes(payload[at : at + 4], "little")
        if end > len(payload) or at + 4 > len(payload):
            raise ValueError("cut short")
        yield payload[at + 4 : end]
        at = end


class RecordedResult(Generic[Result]):
    """Idempotency: a request's result, made once, so that a retry gets to the last digit what the first call got.

    The store calls `outcome_of` inside the commit, where the result has to be written; whoever answers the client asks
    for `result` afterwards.

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
    def outcome_of(self) -> OutcomeOf | None:
        """What the commit takes."""
        return self._record if self._write is not None else None

    def result(self, agent: AgentRecord, persisted: bool) -> Result:
        # The transaction itself may be what the disk refused, after the result was made for it.
        if self._made is not None and self._made[0] == persisted:
            return self._made[1]
        return self._make(agent, persisted)

    def _record(self, agent: AgentRecord, persisted: bool) -> RequestOutcome:
        assert self._write is not None
        result = self._make(agent, persisted)
        self._made = persisted, result
        return self._write(result)


class Requests:
    """The running requests that have an id, and those that are over.

    Args:
        kept: finds what was written of a request that is over, by tenant and request id. It may wait.
    """

    def __init__(self, kept: Callable[[str, str], Awaitable[RequestOutcome | None]]) -> None:
        self._kept = kept
        self._running: dict[tuple[str, str], tuple[Identity, Run[Any]]] = {}
        self._looking: dict[tuple[str, str], asyncio.Event] = {}

    async def run_once(
        self,
        key: AgentKey,
        identity: Identity | None,
        codec: ResponseCodec[EventT],
        begin: Callable[[], Run[EventT]],
    ) -> Run[EventT]:
        """The run of this request: a new one, the one that still runs, or a replay.

        Raises:
            RequestIdReused: if the id was used for another request.
            OutcomeUnreadable: if it is over, and its answer can't be replayed.
        """
        if identity is None:
            return begin()
        name = (key.tenant, identity.request_id)
        while True:
            if name in self._looking:
                await self._looking[name].wait()
            elif name in self._running:
                known, run = self._running[name]
                _require_same(known.body_hash, identity)
                if run.stopped is None:
                    return run
                # It is being cancelled. What it leaves, if anything, is in the store once it is over.
                await run.over.wait()
            else:
                break
        outcome = await self._look(name)
        if outcome is not None:
            _require_same(outcome.body_hash, identity)
            return codec.replay(outcome)
        run = begin()
        self._running[name] = identity, run
        run.when_over(lambda: self._running.pop(name))
        return run

    async def _look(self, name: tuple[str, str]) -> RequestOutcome | None:
        """What was kept; others with this id wait meanwhile."""
        looked = self._looking[name] = asyncio.Event()
        try:
            return await self._kept(*name)
        finally:
            del self._looking[name]
            looked.set()


def _require_same(body_hash: bytes, identity: Identity) -> None:
    if body_hash != identity.body_hash:
        raise RequestIdReused(
            f"request_id {identity.request_id!r} was used for another request; use a new id for a new request",
            request_id=identity.request_id,
        )
