"""What nobody waits for any more is not computed."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.harness import refused, serving, some_tokens, token_ids
from tests.e2e.test_order import await_that, read_deltas


def test_a_request_whose_deadline_passes_in_the_queue_is_never_computed(tmp_path: Path) -> None:
    """Whether it waits for the engine or for its agent's turn."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def computed() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith("warmkv_computed_tokens_total")).split()[1])

    with serving(tmp_path / "data", "--max-batch", "1", "--metrics-port", str(port)) as (_, client):
        running = client.stream("busy", token_ids(some_tokens(20)), max_tokens=20_000, ignore_eos=True)
        read_deltas(running, 1)
        assert computed() == 20
        waiting: list[Any] = [
            client.stream(agent, token_ids(some_tokens(500, seed=1)), timeout=0.5) for agent in ("new", "busy")
        ]
        await_that(lambda: client.stats().gauges.queue_depth == 2)
        for stream in waiting:
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await_that(lambda: client.stats().gauges.queue_depth == 0)
        read_deltas(running, 1)  # it goes on
        running.cancel()
        assert client.extend("busy", token_ids([301])).cache.prefilled_tokens == 1  # behind what ran, and nothing else
        with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
            client.get("new")
        assert computed() == 20 + 1
