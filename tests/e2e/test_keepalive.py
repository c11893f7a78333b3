"""Clients may ask every second whether their connection lives, whatever is silent."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.e2e.harness import Client, Server

EVERY_SECOND = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SILENT_SECONDS = 8.0
"""A server that minds pings ends the connection after the third."""


def test_pings_every_second_end_neither_a_silent_call_nor_an_idle_connection(server: Server) -> None:
    with Client(server.address, options=EVERY_SECOND) as idle, Client(server.address, options=EVERY_SECOND) as silent:
        states: list[grpc.ChannelConnectivity] = []
        idle.channel.subscribe(states.append, try_to_connect=True)
        grpc.channel_ready_future(idle.channel).result(60)
        request = health_pb2.HealthCheckRequest()
        watch = silent.health.Watch(request, timeout=SILENT_SECONDS)  # type: ignore[attr-defined]
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED, caught.value
        assert states[-1] is grpc.ChannelConnectivity.READY
        assert states.count(grpc.ChannelConnectivity.READY) == 1, states
