"""A server that ends by itself is replaced on its port; this needs one that a request can end."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.hostile import http2
from warmkv_server.service.listener import Listener, make_server

PATIENCE = 60.0


async def count(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request + request


def plain() -> grpc.aio.Server:
    """gRPC's own, whose loop ends with a path that is not UTF-8."""
    return with_method(grpc.aio.server())


def with_method(server: grpc.aio.Server) -> grpc.aio.Server:
    server.add_registered_method_handlers("test.Twice", {"Say": grpc.stream_stream_rpc_method_handler(count)})
    return server


def bind(server: grpc.aio.Server, port: int) -> int:
    return server.add_insecure_port(f"127.0.0.1:{port}")


def twice(channel: grpc.aio.Channel, patience: float | None = None) -> Any:
    say: Any = channel.stream_stream("/test.Twice/Say")
    return say(wait_for_ready=True, timeout=patience)


async def end_by_request(port: int) -> None:
    def attack() -> None:
        with http2.connection(f"127.0.0.1:{port}") as stranger:
            stranger.begin()
            stranger.send(http2.call(path=b"/\xff"))
            stranger.heard()

    await asyncio.to_thread(attack)


async def doubled(channel: grpc.aio.Channel, data: bytes) -> bytes:
    """The answer to one message; a call that a server took just before it ended is never answered, and is made anew."""
    while True:
        call = twice(channel, patience=PATIENCE / 20)
        try:
            await call.write(data)
            answer: bytes = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await asyncio.sleep(0)
            continue
        call.cancel()
        return answer


async def test_the_port_is_taken_again_and_what_runs_goes_on() -> None:
    listener = Listener(plain, bind)
    port = listener.bind(0)
    await listener.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as old:
            running = twice(old)
            await running.write(b"a")
            assert await running.read() == b"aa"
            for _ in range(3):
                await end_by_request(port)
                options = [("grpc.use_local_subchannel_pool", 1)]
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as new:
                    assert await doubled(new, b"b") == b"bb"
            await running.write(b"c")
            assert await running.read() == b"cc"
            assert not listener.lost.done()
            running.cancel()
    finally:
        await listener.stop(0)


async def test_who_can_not_have_the_port_again_is_told() -> None:
    def once(server: grpc.aio.Server, port: int) -> int:
        if port:
            raise RuntimeError("taken")
        return bind(server, port)

    listener = Listener(plain, once)
    port = listener.bind(0)
    await listener.start()
    try:
        await end_by_request(port)
        await asyncio.wait_for(listener.lost, PATIENCE)
    finally:
        await listener.stop(0)


async def test_a_server_that_no_path_ends(caplog: pytest.LogCaptureFixture) -> None:
    server = with_method(make_server([]))
    port = bind(server, 0)
    await server.start()
    try:
        await end_by_request(port)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = twice(channel)
            await call.write(b"a")
            assert await call.read() == b"aa"
            call.cancel()
            nothing: Any = channel.unary_unary("/test.Twice/Nothing")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await nothing(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(0)
    assert not caplog.records


async def test_calls_of_different_methods_are_taken_in_as_they_came() -> None:
    came, all_came = list[int](), asyncio.Event()

    async def note(_: Any, context: Any) -> bytes:
        came.append(int(await context.read()))
        if len(came) == len(calls):
            all_came.set()
        return b""

    server = make_server([])
    names = ("A", "B", "C")
    server.add_registered_method_handlers(
        "test.Order", {name: grpc.stream_unary_rpc_method_handler(note) for name in names}
    )
    port = bind(server, 0)
    await server.start()
    chance = random.Random(1)
    paths = [f"/test.Order/{chance.choice(names)}".encode() for _ in range(60)]
    calls = [
        http2.call(path=path, stream=2 * number + 1, body=http2.message(b"%d" % number))
        for number, path in enumerate(paths)
    ]

    done = threading.Event()

    def send() -> None:
        with http2.connection(f"127.0.0.1:{port}") as client:
            client.begin()
            client.send(b"".join(calls))
            client.heard()
            assert done.wait(PATIENCE)

    try:
        sending = asyncio.create_task(asyncio.to_thread(send))
        await asyncio.wait_for(all_came.wait(), PATIENCE)
        done.set()
        await sending
    finally:
        done.set()
        await server.stop(0)
    assert came == sorted(came)
