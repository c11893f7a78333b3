"""Requests' bytes: asked for when the call is known to be welcome, and inflated no further than they may be long.

gRPC's core hands out messages as they came. If it inflated and decoded them, as it does by default, then before anybody
could say whether the caller is known; and 100 KB can inflate to 100 MB.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from warmkv_server.errors import MalformedMessage, MessageTooLarge, WarmKVError
from warmkv_server.platform.malloc import give_back_later

RpcContext = grpc.aio.ServicerContext[Any, Any]
Kind = TypeVar("Kind", bound=Message)
Refusal = Callable[[bytes], WarmKVError | None]
"""Why a message can't be taken, as far as its bytes tell before a message is made of them."""

OPTIONS = (
    ("grpc.per_message_decompression", 0),
    # Identity and gzip, by their bits. A gzip file can't be taken for a message, whose first byte never is 0x1f, a
    # field of type 7; the beginning of what deflate makes could. Clients learn from the server what it takes.
    ("grpc.compression_enabled_algorithms_bitset", 0b101),
)
"""Of a server whose messages are read here."""

_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = zlib.MAX_WBITS | 16
_LARGE_BYTES = 1 << 20
"""Of a message that leaves much memory free behind it."""
_MESSAGE_SECONDS = 60.0
"""For the one message of a call: a call without one holds a place and memory for nobody."""
_STEP = 1 << 18
"""Bytes that are inflated before others get a turn on the event loop."""


def _nothing(_: bytes) -> None:
    """Refuses nothing."""


async def read(context: RpcContext, kind: type[Kind], limit: int, refusal: Refusal = _nothing) -> Kind:
    """The one message of a request, within a minute.

    Args:
        limit: most bytes of it, inflated or not.

    Raises:
        MalformedMessage, MessageTooLarge, and what `refusal` gives
    """
    try:
        async with asyncio.timeout(_MESSAGE_SECONDS):
            async for message in read_all(context, kind, limit, refusal):
                return message
    except TimeoutError:
        raise MalformedMessage(
            f"within {_MESSAGE_SECONDS:g} seconds no whole {kind.DESCRIPTOR.full_name} has come; send it at once, or "
            "in parts, with Extend",
            limit=_MESSAGE_SECONDS,
            unit="seconds",
        ) from None
    raise MalformedMessage(f"the call ended before its {kind.DESCRIPTOR.full_name} had come")


async def read_all(
    context: RpcContext, kind: type[Kind], limit: int, refusal: Refusal = _nothing
) -> AsyncIterator[Kind]:
    """The messages of a request, as they come."""
    while (data := await context.read()) is not grpc.aio.EOF:
        if len(data) > limit:
            raise _too_large(f"{len(data)} bytes", limit, len(data))
        if data.startswith(_GZIP):
            data = await _inflate(data, limit)
        if len(data) > _LARGE_BYTES:
            give_back_later()
        if (refused := refusal(data)) is not None:
            try:
                raise refused
            finally:
                # The error knows this frame, by its traceback: by knowing it too, the frame would keep the message.
                del refused
        try:
            yield kind.FromString(data)
        except DecodeError:
            raise MalformedMessage(f"the request's bytes are not a {kind.DESCRIPTOR.full_name}") from None


def gone() -> NoReturn:
    """Leave a call that gRPC has ended, as it does with one whose client is gone or whose message is far too large."""
    raise asyncio.CancelledError


async def _inflate(data: bytes, limit: int) -> bytes:
    inflating, inflated = zlib.decompressobj(_GZIP_WINDOW), bytearray()
    try:
        while not inflating.eof:
            part = inflating.decompress(inflating.unconsumed_tail or data, _STEP)
            if not part and not inflating.eof:
                raise MalformedMessage("the request's bytes are the beginning of a gzip file only")
            data = b""
            inflated += part
            if len(inflated) > limit:
                raise _too_large(f"more than {limit} bytes, inflated", limit)
            await asyncio.sleep(0)
    except zlib.error:
        raise MalformedMessage("the request's bytes begin as a gzip file does, but are none") from None
    return bytes(inflated)


def _too_large(size: str, limit: int, actual: int | None = None) -> MessageTooLarge:
    return MessageTooLarge(
        f"the request has {size}, and this server takes {limit}; send the content in parts, with Extend",
        limit=limit,
        actual=actual,
        unit="bytes",
    )
