"""What is kept for a retry is what was sent."""

from __future__ import annotations

import pytest

from warmkv_server.agents.types import (
    CacheReport,
    GenerateEvent,
    GenerateFinished,
    GenerateStarted,
    Identity,
    Recorded,
    Timings,
)
from warmkv_server.contract.generation import Delta, Finish, Logprobs
from warmkv_server.contract.kv import Fallback, Source
from warmkv_server.errors import OutcomeUnreadable
from warmkv_server.kv.store import RequestOutcome
from warmkv_server.service import convert
from warmkv_server.service.response_codecs import response_codecs

IDENTITY = Identity("retry-me", b"body")
CACHE = CacheReport(Source.WARM, 10, 1, 2, 3, 4, Fallback.CHECKSUM)
EVENTS: list[GenerateEvent] = [
    GenerateStarted("a", CACHE),
    Delta((1, 2), "a b\n\x00é", (Logprobs(1, -0.1, ((1, -0.1), (7, -1e-30))), Logprobs(2, float("-inf"), ()))),
    GenerateFinished(Finish.STOP_SEQUENCE, "\n", 2, CACHE, Timings(0.1, 1 / 3, 1e-9), agent=None, persisted=True),
]


async def test_a_generate_is_kept_to_the_last_digit() -> None:
    codec = response_codecs().generate
    run = codec.replay(codec.outcome(IDENTITY, EVENTS))
    with run.watch() as watch:
        replayed = [event async for event in watch]
    assert all(isinstance(event, Recorded) for event in replayed)
    assert [message for event in replayed for message in convert.generate_responses(event)] == [
        message for event in EVENTS for message in convert.generate_responses(event)
    ]


def test_bytes_that_are_no_message_are_not_replayed() -> None:
    codec = response_codecs().generate
    good = codec.outcome(IDENTITY, EVENTS).payload
    bad = good[:6] + b"\xff" * (len(good) - 6)
    with pytest.raises(OutcomeUnreadable):
        codec.replay(RequestOutcome("retry-me", b"body", bad))
