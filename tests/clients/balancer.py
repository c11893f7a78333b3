"""A balancer in front of a server, for which each call's first try finds nobody."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

FOREVER = 1e9
"""Seconds that are left of a call are more, where it has no deadline."""


@contextmanager
def balancer(server: str) -> Iterator[tuple[str, set[str]]]:
    """Its address, and the methods that it has refused once, as UNAVAILABLE. What is tried again goes to the server."""
    refused: set[str] = set()
    front = grpc.server(ThreadPoolExecutor(8))
    with grpc.insecure_channel(server) as channel:
        front.add_generic_rpc_handlers([_Forwarding(channel, refused)])
        port = front.add_insecure_port("127.0.0.1:0")
        front.start()
        try:
            yield f"127.0.0.1:{port}", refused
        finally:
            front.stop(None).wait()


class _Forwarding(grpc.GenericRpcHandler):
    """Every method as a stream of bytes both ways, which on the wire a single message is, too."""

    def __init__(self, channel: grpc.Channel, refused: set[str]) -> None:
        self._channel = channel
        self._refused = refused

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._forward(call.method, requests, context)
        )

    def _forward(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if method not in self._refused:
            self._refused.add(method)
            context.abort(grpc.StatusCode.UNAVAILABLE, "no server behind this balancer")
        forward: Any = self._channel.stream_stream(method)
        left = context.time_remaining()
        forwarded = forward(requests, timeout=left if left is not None and left < FOREVER else None)
        context.add_callback(forwarded.cancel)
        try:
            yield from forwarded
        except grpc.RpcError:
            context.set_trailing_metadata(forwarded.trailing_metadata())
            context.abort(forwarded.code(), forwarded.details())
