"""The longest context that a server takes, over a connection that is asked every ten seconds whether it lives."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

from tests.e2e.harness import Client, serving, some_tokens, token_ids
from warmkv import v1

LONGEST = 12_288
EVERY_TEN_SECONDS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
GAP_SECONDS = 50.0
"""Ten times what the contract says."""


def test_a_prime_of_the_longest_context(tmp_path: Path) -> None:
    """Silent as Prime, and with its progress as PrimeStream: one request, computed once."""
    with (
        serving(tmp_path / "data", "--context-limit", str(LONGEST)) as (server, _),
        Client(server.address, options=EVERY_TEN_SECONDS) as client,
    ):
        fields = {"agent_id": "a", "content": token_ids(some_tokens(LONGEST)), "request_id": "one"}
        silent = client.agents.Prime.future(v1.PrimeRequest(**fields))  # type: ignore[arg-type]
        at, events = [time.monotonic()], []
        for event in client.agents.PrimeStream(v1.PrimeStreamRequest(**fields)):  # type: ignore[arg-type]
            at.append(time.monotonic())
            events.append(event)
        primed = silent.result()
        assert events[-1].response == primed
        assert (primed.agent.token_count, primed.persisted) == (LONGEST, True)
        assert primed.cache.prefilled_tokens == LONGEST
        assert len(at) > LONGEST // 256 // 2
        assert max(after - before for before, after in pairwise(at)) < GAP_SECONDS
        seconds = primed.timings.prefill.ToNanoseconds() / 1e9
        print(f"{LONGEST} tokens in {seconds:.1f} s")
