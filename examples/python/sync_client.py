"""A conversation with a WarmKV server in Python: `python sync_client.py [HOST:PORT [SECONDS [TOKENS]]]`.

It needs `pip install . grpcio-health-checking` in the checkout, the latter for the server's health alone.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from warmkv import v1
from warmkv.client import Client, WarmKVError

TOKENS_TO_WAIT_FOR = 8


def main(target: str = "127.0.0.1:50051", seconds: str = "0", tokens: str = "0") -> None:
    # Keepalive: every 10 seconds the client asks whether the connection lives; without this, every 20 seconds.
    # Retries: what finds no server, or one that loads or stops, is tried again, which is built in.
    with Client(target, timeout=300, options=[("grpc.keepalive_time_ms", 10_000)]) as client:
        client.wait_until_ready(120)
        ask(client, "Hello! My name is Grace, and I write Python.")
        ask(client, "What is my name?")
        cancel(client)
        fail(client)
        if float(seconds):
            stay_silent(client, float(seconds))
        if int(tokens):
            prime(client, int(tokens))


def ask(client: Client, message: str) -> None:
    """Print an answer as it comes, and then what was reused for it."""
    with client.stream("example-python", message, max_tokens=32) as stream:
        for text in stream:
            print(text, end="", flush=True)
    cache, timings = stream.answer.cache, stream.answer.finished.timings
    source = v1.CacheSource.Name(cache.source).removeprefix("CACHE_SOURCE_")
    first = timings.first_token.ToTimedelta().total_seconds()
    print(f"\n[{source}] reused {cache.cached_tokens} of {cache.prompt_tokens} tokens, first token in {first:.3f} s")


def cancel(client: Client) -> None:
    """Leave an answer in the middle. What was sampled by then is committed."""
    with client.stream("example-python", "Tell me a long story.", max_tokens=10_000, ignore_eos=True) as stream:
        for _ in stream.events():
            if len(stream.answer.token_ids) >= TOKENS_TO_WAIT_FOR:
                break
    print(f"cancelled after {len(stream.answer.token_ids)} tokens")


def fail(client: Client) -> None:
    """An error says what is wrong in words for people, and for programs in a reason and its metadata."""
    try:
        client.get("nobody")
    except WarmKVError as error:
        print(f"{error.code.name}: {error.reason} {dict(error.metadata)}")


def stay_silent(client: Client, seconds: float) -> None:
    """A call that hears nothing for so long lasts to its own deadline, since pings keep the connection."""
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    try:
        for _ in health.Watch(health_pb2.HealthCheckRequest(), timeout=seconds):
            pass
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    print(f"silent for {seconds:g} s, and still connected")


def prime(client: Client, count: int) -> None:
    """Make a context of so many tokens. The call hears nothing until they are computed, but for the pings."""
    ids = (300 + n * n * 13 % 2700 for n in range(count))
    primed = client.prime("example-python-long", v1.Content(token_ids=v1.TokenIds(ids=ids)))
    print(f"primed {primed.agent.token_count} tokens in {primed.timings.prefill.ToTimedelta().total_seconds():.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
