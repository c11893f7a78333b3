"""What nobody waits for any more is not computed."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from tests.e2e.harness import Client, free_port, refused, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that, read_deltas

NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND")
Computed = Callable[[], int]


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Computed]]:
    """A server that runs one request at a time, and how many tokens of prompts it has computed."""
    port = free_port()

    def computed() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return int(float(next(line for line in lines if line.startswith("warmkv_computed_tokens_total")).split()[1]))

    data = tmp_path_factory.mktemp("counting") / "data"
    with serving(data, "--max-batch", "1", "--metrics-port", str(port)) as (_, client):
        yield client, computed


def test_a_request_whose_deadline_passes_in_the_queue_is_never_computed(counting: tuple[Client, Computed]) -> None:
    """Whether it waits for the engine or for its agent's turn."""
    client, computed = counting
    before = computed()
    running = client.stream("busy", token_ids(some_tokens(20)), max_tokens=20_000, ignore_eos=True)
    read_deltas(running, 1)
    assert computed() - before == 20

    def waited(seconds: float) -> bool:
        """Whether both were seen waiting before their deadline."""
        waiting: list[Any] = [
            client.stream(agent, token_ids(some_tokens(500, seed=1)), timeout=seconds) for agent in ("new", "busy")
        ]
        seen = False
        while any(stream.is_active() for stream in waiting):
            seen |= client.stats().gauges.queue_depth == 2
        for stream in waiting:
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return seen

    assert any(waited(seconds) for seconds in (0.5, 2.0, 8.0)), "also on a machine that has much to do"
    await_that(lambda: client.stats().gauges.queue_depth == 0)
    read_deltas(running, 1)  # it goes on
    running.cancel()
    assert client.extend("busy", token_ids([301])).cache.prefilled_tokens == 1  # behind what ran, and nothing else
    with refused(*NOT_FOUND):
        client.get("new")
    assert computed() - before == 20 + 1


def test_a_prompt_that_nobody_waits_for_is_not_computed_to_its_end(counting: tuple[Client, Computed]) -> None:
    client, computed = counting
    before = computed()
    stream = client.stream("left", token_ids(some_tokens(20_000, seed=2)))
    assert any(event.HasField("prefill_progress") for event in stream)
    assert client.stats().gauges.batch_size == 1
    stream.cancel()
    await_that(lambda: client.stats().gauges.batch_size == 0)
    assert 0 < computed() - before < 10_000
    with refused(*NOT_FOUND):
        client.get("left")
