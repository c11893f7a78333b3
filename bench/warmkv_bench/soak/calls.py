"""A Generate that may be given up at any moment, and what came of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from warmkv import v1 as pb
from warmkv_bench.client import Client

DETAILS_KEY = "grpc-status-details-bin"


@dataclass(slots=True)
class Reply:
    """What a Generate gave until its end.

    Attributes:
        margins: of each token, how far the second most probable was behind the most probable one, in natural
            logarithms; empty unless two log-probabilities were asked for.
        error: the status it ended with; None if it ended OK. `reason` is the server's own for it.
        given_up: whether it was this client that ended it.
    """

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finished: pb.GenerateFinished | None = None
    error: str | None = None
    reason: str = ""
    given_up: bool = False


async def ask(client: Client, request: pb.GenerateRequest, give_up_after_s: float | None = None) -> Reply:
    """Runs it to its end, or gives it up after so many seconds, wherever it is then."""
    reply = Reply()
    call = client.stream(request)
    timer = None
    if give_up_after_s is not None:
        timer = asyncio.get_running_loop().call_later(give_up_after_s, call.cancel)
    try:
        async for message in call:
            reply.tokens += message.delta.token_ids
            reply.margins += [_margin(each) for each in message.delta.logprobs]
            if message.HasField("finished"):
                reply.finished = message.finished
    except aio.AioRpcError as error:
        reply.error, reply.reason = error.code().name, _reason(error)
    except asyncio.CancelledError:
        if not call.cancelled():
            raise  # this task is cancelled, not the call
        reply.error = grpc.StatusCode.CANCELLED.name
    finally:
        if timer is not None:
            timer.cancel()
    reply.given_up = reply.error == grpc.StatusCode.CANCELLED.name
    return reply


def _margin(token: pb.TokenLogprobs) -> float:
    return token.top[0].logprob - token.top[1].logprob if len(token.top) > 1 else 0.0


def _reason(error: aio.AioRpcError) -> str:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info.reason
    return ""
