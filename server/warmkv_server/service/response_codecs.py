"""Answers as they are kept for retries: the bytes of the messages that were sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from warmkv.v1 import agent_service_pb2 as pb
from warmkv_server.agents.idempotency import ResponseCodec, ResponseCodecs
from warmkv_server.agents.types import Recorded
from warmkv_server.service import convert

EventT = TypeVar("EventT")


def response_codecs() -> ResponseCodecs:
    return ResponseCodecs(
        prime=_codec(pb.PrimeResponse, lambda result: [convert.prime_response(result)]),
        extend=_codec(pb.ExtendResponse, lambda result: [convert.extend_response(result)]),
        generate=_codec(pb.GenerateResponse, convert.generate_responses),
        fork=_codec(pb.ForkAgentResponse, lambda result: [convert.fork_response(result)]),
    )


def _codec(kind: type[Message], messages_of: Callable[[EventT], Iterable[Message]]) -> ResponseCodec[EventT]:
    def decode(content: bytes) -> Recorded:
        message = kind()
        try:
            message.ParseFromString(content)
        except DecodeError as error:
            raise ValueError("not a message of its kind") from error
        return Recorded(message)

    return ResponseCodec(lambda event: [message.SerializeToString() for message in messages_of(event)], decode)
