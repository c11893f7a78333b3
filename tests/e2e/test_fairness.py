"""A tenant that sends much doesn't hold up one that sends little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from tests.e2e.harness import Client, refused, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that, read_deltas
from warmkv import v1

FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")


def test_tenants_share_the_queue_and_take_turns(tmp_path: Path) -> None:
    """One runs at a time and five wait: three of six are a tenant's share."""
    tokens = tmp_path / "tokens"
    tokens.write_text("red red-token\nblue blue-token\nblue another-token\n")
    flags = ["--token-file", str(tokens), "--max-batch", "1", "--max-queue", "5"]
    with (
        serving(tmp_path / "data", *flags) as (server, _),
        Client(server.address, token="red-token") as red,
        Client(server.address, token="blue-token") as blue,
    ):

        def prime(client: Client, number: int, depth: int) -> Any:
            """In flight, and known to wait: behind an answer of the same tenant."""
            request = v1.PrimeRequest(agent_id=f"a{number}", content=token_ids(some_tokens(1000, number)))
            future = client.agents.Prime.future(request, metadata=client.metadata)
            await_that(lambda: red.stats().gauges.queue_depth >= depth)
            return future

        def answering(client: Client) -> Any:
            stream = client.stream("", token_ids(some_tokens(20)), max_tokens=20_000, ignore_eos=True)
            read_deltas(stream, 1)
            return stream

        streams = [answering(red)]
        reds = [prime(red, number, number + 1) for number in range(5)]
        with refused(*FULL) as refusals:
            red.prime("one-too-many", token_ids(some_tokens(20)))
        assert refusals[0].retry_seconds == 1.0
        streams.append(answering(blue))  # takes the place of red's, and they go on in turns
        blues = [prime(blue, number, number + 2) for number in range(5, 7)]
        for client in (red, blue):
            with refused(*FULL):
                client.prime("one-too-many", token_ids(some_tokens(20)))
        for stream in streams:
            stream.cancel()
        red_ends, blue_ends = (
            [future.result().agent.create_time.ToNanoseconds() for future in futures] for futures in (reds, blues)
        )
        # Of five and two in turns, at least two are left when the two are over.
        assert sum(end > max(blue_ends) for end in red_ends) >= 2
