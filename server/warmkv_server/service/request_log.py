"""One line in the log for each request: who asked what, what came of it, and what it cost. Never what was said."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from warmkv import agent_of
from warmkv.v1 import agent_service_pb2 as pb
from warmkv_server.agents.stages import Stages
from warmkv_server.contract.names import AGENT_ID
from warmkv_server.platform.logs import FIELDS

log = logging.getLogger(__name__)

Value = str | int | float | bool

_PLAIN = re.compile(r"[A-Za-z0-9._:/\[\]@%+-]+")
_REQUEST_ID_CHARACTERS = 128
_LOGINS_A_SECOND = 10
_NOT_LET_IN = grpc.StatusCode.UNAUTHENTICATED


@dataclass
class Asked:
    """One request, as far as it is known.

    Attributes:
        seconds: that it took, once it is over.
        service: the full name of the one that the RPC belongs to.
        agent_id: that the request is about, where none of its fields says so.
        last: the response, or the last message of a stream.
        stages: what it has gone through, once it was let in.
        caller: where it comes from, for traces; None where there are none.
    """

    rpc: str
    peer: str
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    service: str = ""
    agent_id: str = ""
    tenant: str = ""
    request: Message | None = None
    last: Message | None = None
    stages: Stages | None = None
    caller: Any = None

    @cached_property
    def id(self) -> str:
        """The client's, or one of our own, so that a request can be spoken of."""
        given = getattr(self.request, "request_id", "")
        return given if 0 < len(given) <= _REQUEST_ID_CHARACTERS else f"-{secrets.token_hex(6)}"


class RequestLog:
    """Writes the lines. A stranger who guesses tokens gets some of them a second, and then is counted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = 0
        self._refused = 0

    def ended(self, asked: Asked, code: grpc.StatusCode, reason: str) -> None:
        """
        Args:
            reason: as the client got it; empty if it got none.
        """
        level = logging.INFO
        if code is _NOT_LET_IN:
            level = logging.WARNING
            if not self._is_one_of_few():
                return
        if not log.isEnabledFor(level):
            return
        found = fields_of(asked, code, reason)
        log.log(level, "%s", in_words(found), extra={FIELDS: found})

    def _is_one_of_few(self) -> bool:
        """Whether a refused login still gets a line in this second."""
        second = int(self._clock())
        if second != self._second:
            if (more := self._refused - _LOGINS_A_SECOND) > 0:
                log.warning("%d more calls were refused in a second for their token", more)
            self._second, self._refused = second, 0
        self._refused += 1
        return self._refused <= _LOGINS_A_SECOND


def in_words(fields: dict[str, Value]) -> str:
    """name=value, with quotes where a value isn't one plain word."""
    return " ".join(f"{name}={_plain(value)}" for name, value in fields.items())


def fields_of(asked: Asked, code: grpc.StatusCode, reason: str) -> dict[str, Value]:
    """Who asked what, what came of it, and what it cost."""
    return dict(_fields(asked, code, reason))


def _fields(asked: Asked, code: grpc.StatusCode, reason: str) -> Iterator[tuple[str, Value]]:
    yield "rpc", asked.rpc
    yield "id", asked.id
    yield "tenant", asked.tenant
    yield "agent", asked.agent_id or _agent_id(asked.request)
    yield "status", code.name
    if reason:
        yield "reason", reason
    if code is _NOT_LET_IN:
        yield "peer", asked.peer
    yield "ms", _ms(asked.seconds)
    done: Any = asked.last
    if isinstance(done, pb.GenerateResponse):
        done = done.finished if done.HasField("finished") else None
    elif isinstance(done, pb.PrimeStreamResponse | pb.ExtendStreamResponse):
        done = done.response if done.HasField("response") else None
    if isinstance(done, pb.PrimeResponse | pb.ExtendResponse | pb.GenerateFinished):
        yield from _cost(done)


def _cost(done: pb.PrimeResponse | pb.ExtendResponse | pb.GenerateFinished) -> Iterator[tuple[str, Value]]:
    """What was reused and computed, and how long each stage took."""
    cache, timings = done.cache, done.timings
    yield "source", pb.CacheSource.Name(cache.source).removeprefix("CACHE_SOURCE_").lower()
    yield "prompt", cache.prompt_tokens
    yield "cached", cache.cached_tokens
    yield "prefilled", cache.prefilled_tokens
    answered = isinstance(done, pb.GenerateFinished)
    if answered:
        yield "completion", done.usage.completion_tokens  # type: ignore[union-attr]
    yield "queue_ms", _ms(_seconds(timings.queue))
    yield "load_ms", _ms(_seconds(timings.load))
    yield "prefill_ms", _ms(_seconds(timings.prefill))
    if answered:
        yield "first_token_ms", _ms(_seconds(timings.first_token))
        yield "decode_ms", _ms(_seconds(timings.decode))
    yield "commit_ms", _ms(_seconds(timings.commit))
    yield "loaded_bytes", cache.bytes_loaded
    if cache.fallback_reason:
        yield "fallback", pb.FallbackReason.Name(cache.fallback_reason).removeprefix("FALLBACK_REASON_").lower()
    yield "persisted", done.persisted


def _agent_id(request: Any) -> str:
    """Of the agent that a request names; nothing of what is no agent_id, which could be anything."""
    given = agent_of(request) or ""
    return given if AGENT_ID.fullmatch(given) else ""


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _plain(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return str(value)
    return value if _PLAIN.fullmatch(value) else ascii(value)
