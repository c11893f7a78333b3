"""The way of a call, over a real socket: what a behaviour raises is what its client is told, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.e2e.harness import refusal_of
from warmkv import v1
from warmkv.v1 import server_service_pb2
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import NotDurable
from warmkv_server.service.auth import Open
from warmkv_server.service.endpoint import Call, Endpoints
from warmkv_server.service.gate import Gate
from warmkv_server.service.metrics import Metrics

SERVICE = server_service_pb2.DESCRIPTOR.services_by_name["ServerService"]
Behaviour = Callable[[Call], Awaitable[v1.GetServerInfoResponse]]


class Servicer:
    """A ServerService whose GetServerInfo does what a test wants."""

    def __init__(self, behave: Behaviour) -> None:
        self._behave = behave

    async def get_server_info(self, _: v1.GetServerInfoRequest, call: Call) -> v1.GetServerInfoResponse:
        return await self._behave(call)

    async def get_server_stats(self, _: v1.GetServerStatsRequest, __: Call) -> v1.GetServerStatsResponse:
        return v1.GetServerStatsResponse()

    async def count_tokens(self, _: v1.CountTokensRequest, __: Call) -> v1.CountTokensResponse:
        return v1.CountTokensResponse()


@asynccontextmanager
async def serving(behave: Behaviour) -> AsyncIterator[tuple[Any, Gate, Metrics]]:
    gate, metrics = Gate(), Metrics()
    agents: Any = object()  # no behaviour here looks at it
    gate.open(agents)
    server = grpc.aio.server()
    endpoints = Endpoints(gate, Open(), metrics, Settings(max_message_bytes=100))
    server.add_registered_method_handlers(SERVICE.full_name, endpoints.handlers(SERVICE, Servicer(behave)))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield v1.ServerServiceStub(channel), gate, metrics
    finally:
        await server.stop(0)


async def failure(behave: Behaviour) -> Any:
    async with serving(behave) as (stub, _, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetServerInfo(v1.GetServerInfoRequest(), timeout=60)
        return refusal_of(caught.value)


async def test_a_known_error_keeps_its_words() -> None:
    async def behave(_: Call) -> v1.GetServerInfoResponse:
        raise NotDurable("the disk is full")

    refusal = await failure(behave)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_DURABLE")
    assert refusal.message == "the disk is full"


async def test_what_was_not_foreseen_is_an_id_to_the_client_and_all_of_it_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def behave(_: Call) -> v1.GetServerInfoResponse:
        raise ZeroDivisionError("secret internals")

    refusal = await failure(behave)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_ERROR")
    assert "secret" not in refusal.message
    error_id = refusal.message.split()[2].rstrip(";")
    assert f"internal error {error_id} in GetServerInfo" in caplog.text
    assert "secret internals" in caplog.text


async def test_a_stray_cancellation_does_not_leave_the_client_without_a_status() -> None:
    async def behave(_: Call) -> v1.GetServerInfoResponse:
        raise asyncio.CancelledError

    refusal = await failure(behave)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_ERROR")


async def test_a_cancelled_call_ends_what_it_waits_for() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def behave(_: Call) -> v1.GetServerInfoResponse:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError("unreachable")

    async with serving(behave) as (stub, gate, metrics):
        call = stub.GetServerInfo(v1.GetServerInfoRequest())
        await begun.wait()
        call.cancel()
        await asyncio.wait_for(ended.wait(), 60)
        await asyncio.wait_for(gate.empty(), 60)
        labels = {"method": "GetServerInfo", "code": "CANCELLED"}
        assert metrics.registry.get_sample_value("warmkv_rpcs_total", labels) == 1


async def test_the_gate_is_empty_only_when_nobody_is_inside() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def behave(_: Call) -> v1.GetServerInfoResponse:
        begun.set()
        await go_on.wait()
        return v1.GetServerInfoResponse()

    async with serving(behave) as (stub, gate, _):
        call = stub.GetServerInfo(v1.GetServerInfoRequest())
        await begun.wait()
        gate.close()
        empty = asyncio.create_task(gate.empty())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetServerStats(v1.GetServerStatsRequest())
        assert refusal_of(caught.value).reason == "DRAINING"
        assert not empty.done()
        go_on.set()
        await call
        await asyncio.wait_for(empty, 60)


async def test_a_request_over_the_limit_is_not_read() -> None:
    async def behave(_: Call) -> v1.GetServerInfoResponse:
        return v1.GetServerInfoResponse()

    async with serving(behave) as (stub, _, _):
        content = v1.Content(text="x" * 100)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CountTokens(v1.CountTokensRequest(content=content))
        assert refusal_of(caught.value).reason == "MESSAGE_TOO_LARGE"
        content = v1.Content(text="x" * 80)
        await stub.CountTokens(v1.CountTokensRequest(content=content))
