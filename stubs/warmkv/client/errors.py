"""What a call that failed raises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class WarmKVError(Exception):
    """A call ended with an error, the server's or the connection's.

    Attributes:
        rpc: its name, such as "Generate".
        code: gRPC's code.
        message: what is wrong, for a person.
        reason: what to switch on, such as "CONTEXT_TOO_LONG"; empty if it isn't the server that says so, as where it
            can't be reached. The protos list the reasons of each RPC.
        metadata: what else the server says with the reason.
        fields: the wrong fields of the request, each with what it must be.
        retry_after: seconds after which the same request may succeed; None where the server names none.
    """

    def __init__(
        self,
        rpc: str,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{rpc}: {code.name}{f' ({reason})' if reason else ''}: {message}")
        self.rpc = rpc
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.fields = dict(fields or {})
        self.retry_after = retry_after

    @classmethod
    def of(cls, rpc: str, error: Any) -> WarmKVError:
        """From what grpc raises for a call, sync or async."""
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        retry_after: float | None = None
        try:
            status = rpc_status.from_call(error)
        except ValueError:  # something between here and the server has changed the one and not the other
            status = None
        for detail in status.details if status is not None else ():
            detail.Unpack(info)
            detail.Unpack(bad)
            if detail.Unpack(retry):
                retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        return cls(
            rpc,
            error.code(),
            error.details() or "",
            reason=info.reason,
            metadata=info.metadata,
            fields={violation.field: violation.description for violation in bad.field_violations},
            retry_after=retry_after,
        )

    @property
    def is_unavailable(self) -> bool:
        """Whether there is no server now, or one that loads or stops; the same request may succeed later.

        INTERNAL without a reason is what a router says of a server that died in the middle of a call.
        """
        if self.code is grpc.StatusCode.INTERNAL:
            return not self.reason
        return self.code is grpc.StatusCode.UNAVAILABLE and self.reason != "STORAGE_UNAVAILABLE"


@contextmanager
def raising(rpc: str) -> Iterator[None]:
    """Raise what grpc raises as WarmKVError."""
    try:
        yield
    except grpc.RpcError as error:
        raise WarmKVError.of(rpc, error) from None
