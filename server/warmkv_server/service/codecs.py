"""Answers as they are kept for retries: the bytes of the messages that were sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from warmkv.v1 import agent_service_pb2 as pb
from warmkv_server.agents.requests import Codec, Codecs
from warmkv_server.agents.types import Recorded
from warmkv_server.service import convert

Event = TypeVar("Event")


def codecs() -> Codecs:
    return Codecs(
        prime=_codec(pb.PrimeResponse, convert.prime_response),
        extend=_codec(pb.ExtendResponse, convert.extend_response),
        generate=_codec(pb.GenerateResponse, convert.generate_response),
        fork=_codec(pb.ForkAgentResponse, convert.fork_response),
    )


def _codec(kind: type[Message], message_of: Callable[[Event], Message]) -> Codec[Event]:
    def decode(content: bytes) -> Recorded:
        message = kind()
        try:
            message.ParseFromString(content)
        except DecodeError as error:
            raise ValueError("not a message of its kind") from error
        return Recorded(message)

    return Codec(lambda event: message_of(event).SerializeToString(), decode)
