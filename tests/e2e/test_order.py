"""Who waits for whom, and what is left when somebody goes away."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.e2e.harness import Client, Server, refusal_of, refused, serving, some_tokens, text, token_ids
from tests.e2e.waiting import PATIENCE, await_that, found, is_idle, read_deltas
from warmkv import v1


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
def test_an_answer_that_nobody_waits_for_is_kept_as_far_as_it_went(
    server: Server, client: Client, agent: str, seed: int, how: str
) -> None:
    prompt = some_tokens(50, seed)
    with Client(server.address) as other:
        other.info()  # of a deadline nothing is left to connecting
        timeout = 2.0 if how == "deadline" else PATIENCE
        stream = other.stream(agent, token_ids(prompt), max_tokens=20_000, ignore_eos=True, timeout=timeout)
        tokens = read_deltas(stream, 3)
        if how == "cancel":
            stream.cancel()
        elif how == "deadline":
            with pytest.raises(grpc.RpcError) as caught:
                tokens += read_deltas(stream, 20_000)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    held = client.extend(agent, token_ids([301])).agent.token_count - 1  # waits for its turn
    assert client.get(agent).revision == 2
    kept = held - len(prompt)
    assert len(tokens) <= kept < len(tokens) + 5000
    on = client.generate(agent, ephemeral=True, max_tokens=1)
    assert on.cache.cached_tokens == held
    again = client.generate("", token_ids(prompt), max_tokens=len(tokens))
    assert again.tokens == tokens


@pytest.mark.parametrize("rpc", ["Prime", "Extend", "Generate"])
def test_all_or_nothing_on_an_agent_that_is_there(client: Client, agent: str, seed: int, rpc: str) -> None:
    before = client.prime(agent, token_ids(some_tokens(20, seed))).agent
    content = token_ids(some_tokens(20_000, seed + 1))
    calls: dict[str, Callable[[], Any]] = {
        "Prime": lambda: client.agents.Prime.future(v1.PrimeRequest(agent_id=agent, content=content)),
        "Extend": lambda: client.agents.Extend.future(v1.ExtendRequest(agent_id=agent, content=content)),
        "Generate": lambda: client.stream(agent, content),
    }
    call = calls[rpc]()
    await_that(lambda: client.get(agent).activity == v1.ACTIVITY_PREFILLING)
    await_that(lambda: client.get(agent).tokens_done > 0)
    busy = client.get(agent)
    assert (busy.token_count, busy.revision) == (20, 1)
    assert 0 < busy.tokens_done <= busy.tokens_total <= 20_020
    call.cancel()
    await_that(lambda: is_idle(client, agent))
    after = client.get(agent)
    assert (after.token_count, after.revision, after.update_time) == (20, 1, before.update_time)


def test_two_agents_answer_at_the_same_time(client: Client, agent: str, seed: int) -> None:
    first = client.stream(agent, token_ids(some_tokens(50, seed)), max_tokens=20_000, ignore_eos=True)
    read_deltas(first, 1)
    second = client.generate(f"{agent}-2", token_ids(some_tokens(50, seed + 1)), max_tokens=20)
    assert len(second.tokens) == 20
    assert client.stats().gauges.batch_size == 1  # the first still goes on
    assert len(read_deltas(first, 5)) >= 5
    first.cancel()
    await_that(lambda: client.stats().gauges.batch_size == 0)


def test_a_short_prompt_does_not_wait_for_a_long_one(client: Client, agent: str, seed: int) -> None:
    long = client.stream(agent, token_ids(some_tokens(20_000, seed)), max_tokens=4)
    assert next(long).HasField("started")
    client.generate(f"{agent}-2", token_ids(some_tokens(50, seed + 1)), max_tokens=4)
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        client.get(agent)  # the long one isn't there yet
    assert client.stats().gauges.batch_size == 1
    long.cancel()
    await_that(lambda: client.stats().gauges.batch_size == 0)


def test_requests_of_one_agent_run_in_order_of_arrival(client: Client, agent: str, seed: int) -> None:
    stream = client.stream(agent, token_ids(some_tokens(50, seed)), max_tokens=40, ignore_eos=True)
    assert next(stream).HasField("started")
    waiting: list[Any] = []
    for number in range(6):
        request = v1.ExtendRequest(agent_id=agent, content=token_ids([300 + number]))
        waiting.append(client.agents.Extend.future(request))
        await_that(lambda: waiting[-1].done() or client.stats().gauges.queue_depth == len(waiting))
    answer = [token for event in stream for token in event.delta.token_ids]
    results = [future.result(timeout=PATIENCE) for future in waiting]
    assert [result.agent.revision for result in results] == [2, 3, 4, 5, 6, 7]
    assert [result.agent.token_count for result in results] == [50 + 40 + n + 1 for n in range(6)]
    tokens = [*some_tokens(50, seed), *answer, *range(300, 306)]
    assert client.prime(agent, token_ids(tokens)).agent.revision == 7


def test_readers_do_not_wait(client: Client, agent: str, seed: int) -> None:
    client.prime(agent, token_ids(some_tokens(50, seed)))
    stream = client.stream(agent, token_ids([301]), max_tokens=20_000, ignore_eos=True)
    read_deltas(stream, 3)
    busy = client.get(agent)
    assert (busy.activity, busy.revision, busy.token_count) == (v1.ACTIVITY_DECODING, 1, 50)
    assert 3 <= busy.tokens_done < busy.tokens_total == 20_000
    assert found(client, agent)[0].activity == v1.ACTIVITY_DECODING
    forked = client.fork(agent, f"{agent}-fork")
    assert forked.token_count == 50
    assert client.update(v1.Agent(agent_id=agent, pinned=True), "pinned").pinned
    stream.cancel()
    await_that(lambda: is_idle(client, agent))
    assert client.get(agent).pinned
    assert client.get(agent).revision == 2


def test_an_agent_does_not_expire_while_something_works_on_it(client: Client, agent: str, seed: int) -> None:
    client.prime(agent, token_ids(some_tokens(50, seed)))
    stream = client.stream(agent, token_ids([301]), max_tokens=20_000, ignore_eos=True)
    read_deltas(stream, 3)
    ttl = client.update(v1.Agent(agent_id=agent, ttl=Duration(nanos=50_000_000)), "ttl").ttl
    time.sleep(5 * ttl.ToNanoseconds() / 1e9)
    read_deltas(stream, 3)
    assert client.get(agent).activity == v1.ACTIVITY_DECODING
    stream.cancel()
    await_that(lambda: not found(client, agent))


def test_delete_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (server, client):
        client.prime("a", token_ids(some_tokens(50)))
        stream = client.stream("a", text(" and"), max_tokens=20_000, ignore_eos=True, request_id="deleted")
        read_deltas(stream, 3)
        waiting: list[Any] = [
            client.agents.Prime.future(v1.PrimeRequest(agent_id="a", content=text("x"))),
            client.agents.Extend.future(v1.ExtendRequest(agent_id="a", content=text("x"))),
            client.agents.EvictAgent.future(v1.EvictAgentRequest(agent_id="a")),
        ]
        await_that(lambda: client.stats().gauges.queue_depth == 3)
        client.delete("a")
        with refused(grpc.StatusCode.ABORTED, "AGENT_DELETED"):
            list(stream)
        for future in waiting:
            error = future.exception(timeout=PATIENCE)
            assert (error.code(), refusal_of(error).reason) == (grpc.StatusCode.ABORTED, "AGENT_DELETED")
        with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
            client.get("a")
        # It begins anew, and reuses nothing of what was deleted.
        again = client.prime("a", token_ids(some_tokens(50)))
        assert (again.agent.revision, again.cache.source) == (1, v1.CACHE_SOURCE_COLD)
        client.delete("a")
        server.kill()
    with serving(tmp_path / "data") as (_, client):
        assert not client.list().agents


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets a process's limits be set from outside")
def test_a_delete_that_the_disk_refuses_ends_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (server, client):
        client.prime("a", token_ids(some_tokens(50)))
        stream = client.stream("a", text(" and"), max_tokens=600, ignore_eos=True)
        read_deltas(stream, 3)
        waiting = client.agents.Extend.future(v1.ExtendRequest(agent_id="a", content=text(" x")))
        await_that(lambda: client.stats().gauges.queue_depth == 1)
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        with refused(grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE"):
            client.delete("a")
        assert client.get("a").activity == v1.ACTIVITY_DECODING
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        finished = list(stream)[-1].finished
        assert finished.usage.completion_tokens == 600
        assert finished.persisted
        extended = waiting.result(timeout=PATIENCE)
        assert extended.agent.token_count == finished.agent.token_count + extended.cache.prefilled_tokens
        server.kill()
    with serving(tmp_path / "data") as (_, client):
        assert client.get("a").token_count == extended.agent.token_count


def test_delete_ends_what_is_about_to_create_the_agent(client: Client, agent: str, seed: int) -> None:
    stream = client.stream(agent, token_ids(some_tokens(50, seed)), max_tokens=20_000, ignore_eos=True)
    read_deltas(stream, 1)
    client.delete(agent)
    with refused(grpc.StatusCode.ABORTED, "AGENT_DELETED"):
        list(stream)
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        client.get(agent)


def test_a_client_that_reads_slowly_holds_up_nobody(client: Client, agent: str, seed: int) -> None:
    slow = client.stream(agent, token_ids(some_tokens(50, seed)), max_tokens=400, ignore_eos=True)
    await_that(lambda: is_idle(client, agent))
    assert client.get(agent).token_count == 450
    assert sum(len(event.delta.token_ids) for event in slow) == 400
