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

        def prime(client: Client, number: int) -> Any:
            """In flight, and known to wait."""
            depth = red.stats().gauges.queue_depth
            request = v1.PrimeRequest(agent_id=f"a{number}", content=token_ids(some_tokens(1000, number)))
            future = client.agents.Prime.future(request, metadata=client.metadata)
            await_that(lambda: red.stats().gauges.queue_depth == depth + 1)
            return future

        running = red.stream("", token_ids(some_tokens(20)), max_tokens=20_000, ignore_eos=True)
        read_deltas(running, 1)
        reds = [prime(red, number) for number in range(5)]
        with refused(*FULL) as refusals:
            red.prime("one-too-many", token_ids(some_tokens(20)))
        assert refusals[0].retry_seconds == 1.0
        blues = [prime(blue, number) for number in range(5, 8)]
        for client in (red, blue):
            with refused(*FULL):
                client.prime("one-too-many", token_ids(some_tokens(20)))
        running.cancel()
        red_ends, blue_ends = (
            [future.result().agent.create_time.ToNanoseconds() for future in futures] for futures in (reds, blues)
        )
        # After each of blue's but the last came one of red's; the other three came behind.
        assert sum(end > max(blue_ends) for end in red_ends) >= 2
