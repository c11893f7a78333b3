"""Every error as a gRPC status: the one map from reasons to codes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from warmkv_server import errors

DOMAIN = "warmkv"
DETAILS_KEY = "grpc-status-details-bin"

CODES: dict[type[errors.WarmKVError], grpc.StatusCode] = {
    errors.InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
    errors.EmptyContent: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextTooLong: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ConstraintTooComplex: grpc.StatusCode.INVALID_ARGUMENT,
    errors.MalformedMessage: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AgentNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AgentExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.RequestIdReused: grpc.StatusCode.ALREADY_EXISTS,
    errors.OutcomeUnreadable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NotDurable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ToolsChanged: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NoPendingCall: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RevisionMismatch: grpc.StatusCode.ABORTED,
    errors.AgentDeleted: grpc.StatusCode.ABORTED,
    errors.RequestCancelled: grpc.StatusCode.ABORTED,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.MemoryBudget: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ConstraintRanOut: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.TokenMissing: grpc.StatusCode.UNAUTHENTICATED,
    errors.TokenInvalid: grpc.StatusCode.UNAUTHENTICATED,
    errors.AgentForbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.Loading: grpc.StatusCode.UNAVAILABLE,
    errors.StorageUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.EngineError: grpc.StatusCode.INTERNAL,
}

# A status travels in HTTP/2 headers, for which clients take 8 KiB in all.
_MESSAGE_CHARACTERS = 300
_NAME_CHARACTERS = 128
_DETAILS_BYTES = 3000


@dataclass(frozen=True)
class Status:
    """What `ServicerContext.abort` takes."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def status_of(error: errors.WarmKVError) -> Status:
    """The status that a client gets for an error, with its details."""
    code = CODES[type(error)]
    message = _cut(str(error), _MESSAGE_CHARACTERS)
    number: int = code.value[0]
    rich = status_pb2.Status(code=number, message=message)
    metadata = {name: _cut(value, _NAME_CHARACTERS) for name, value in error.metadata.items()}
    rich.details.append(_packed(error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.reason, metadata=metadata)))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        rich.details.append(_packed(retry))
    if error.violations:
        room = _DETAILS_BYTES - rich.ByteSize()
        rich.details.append(_packed(_bad_request(error.violations, room)))
    return Status(code, message, ((DETAILS_KEY, rich.SerializeToString()),))


async def refuse(context: grpc.aio.ServicerContext[Any, Any], status: Status) -> None:
    """End a call with a status; without one, if the call is over."""
    with contextlib.suppress(grpc.aio.InternalError):
        await context.abort(status.code, status.message, status.trailing_metadata)


def _bad_request(violations: tuple[errors.Violation, ...], room: int) -> error_details_pb2.BadRequest:
    """As many violations as fit, and how many more there are."""
    bad = error_details_pb2.BadRequest()
    for number, violation in enumerate(violations):
        bad.field_violations.add(
            field=_cut(violation.field, _NAME_CHARACTERS), description=_cut(violation.description, 200)
        )
        if bad.ByteSize() > room:
            bad.field_violations[-1].field = "…"
            bad.field_violations[-1].description = f"{len(violations) - number} more fields are wrong"
            break
    return bad


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
