"""The same on an event loop: `python async_client.py [HOST:PORT [SECONDS]]`.

It needs `pip install . grpcio-health-checking` in the checkout, the latter for the server's health alone.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from warmkv import v1
from warmkv.client import AsyncClient, WarmKVError

TOKENS_TO_WAIT_FOR = 8


async def main(target: str = "127.0.0.1:50051", seconds: str = "0") -> None:
    # As in sync_client.py: pings every 10 seconds, and retries, which are built in.
    async with AsyncClient(target, timeout=300, options=[("grpc.keepalive_time_ms", 10_000)]) as client:
        await client.wait_until_ready(120)
        # Agents don't wait for each other; the turns of one do.
        await asyncio.gather(*(talk(client, f"example-python-aio-{name}", name) for name in ("Guido", "Ada")))
        await cancel(client)
        await fail(client)
        if float(seconds):
            await stay_silent(client, float(seconds))


async def talk(client: AsyncClient, agent_id: str, name: str) -> None:
    for message in (f"Hello! My name is {name}.", "What is my name?"):
        async with client.stream(agent_id, message, max_tokens=32) as stream:
            text = "".join([piece async for piece in stream])
        cache, timings = stream.answer.cache, stream.answer.finished.timings
        source = v1.CacheSource.Name(cache.source).removeprefix("CACHE_SOURCE_")
        first = timings.first_token.ToTimedelta().total_seconds()
        reused = f"{cache.cached_tokens} of {cache.prompt_tokens} tokens"
        print(f"{text}\n[{source}] reused {reused}, first token in {first:.3f} s")


async def cancel(client: AsyncClient) -> None:
    """A task that is cancelled cancels its call, too. What was sampled by then is committed."""
    sampled = asyncio.Event()
    tokens = 0

    async def listen() -> None:
        nonlocal tokens
        story = client.stream("example-python-aio-Ada", "Tell me a long story.", max_tokens=10_000, ignore_eos=True)
        async with story:
            async for event in story.events():
                tokens += len(event.delta.token_ids)
                if tokens >= TOKENS_TO_WAIT_FOR:
                    sampled.set()

    listener = asyncio.create_task(listen())
    await sampled.wait()
    listener.cancel()
    await asyncio.wait([listener])
    print(f"cancelled after {tokens} tokens")


async def fail(client: AsyncClient) -> None:
    """An error says what is wrong in words for people, and for programs in a reason and its metadata."""
    try:
        await client.get("nobody")
    except WarmKVError as error:
        print(f"{error.code.name}: {error.reason} {dict(error.metadata)}")


async def stay_silent(client: AsyncClient, seconds: float) -> None:
    """A call that hears nothing for so long lasts to its own deadline, since pings keep the connection."""
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    try:
        async for _ in health.Watch(health_pb2.HealthCheckRequest(), timeout=seconds):
            pass
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    print(f"silent for {seconds:g} s, and still connected")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
