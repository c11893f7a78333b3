"""A retry with the same request_id does nothing twice, whatever became of the first call."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.harness import Answer, Client, refused, serving, some_tokens, text, token_ids
from tests.e2e.waiting import await_that, is_idle, read_deltas
from warmkv import v1

REUSED = (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
CANCELLED = (grpc.StatusCode.ABORTED, "REQUEST_CANCELLED")


def until_error(stream: Any) -> Iterator[v1.GenerateResponse]:
    """The events before the error that ends it."""
    try:
        yield from stream
    except grpc.RpcError:
        return
    pytest.fail("the stream ended well")


def test_prime_and_extend_again_give_the_first_response(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(300, seed))
    primed = client.prime(agent, content, request_id=f"{agent}-1")
    extended = client.extend(agent, content, request_id=f"{agent}-2")
    assert extended.agent.token_count == 600
    assert client.prime(agent, content, request_id=f"{agent}-1") == primed
    assert client.extend(agent, content, request_id=f"{agent}-2") == extended
    assert (client.get(agent).revision, client.get(agent).token_count) == (2, 600)


def test_fork_again_gives_the_first_response(client: Client, agent: str, seed: int) -> None:
    client.prime(agent, token_ids(some_tokens(20, seed)))
    forked = client.fork(agent, f"{agent}-fork", request_id=agent)
    client.generate(f"{agent}-fork", text(" on"))
    assert client.fork(agent, f"{agent}-fork", request_id=agent) == forked
    with refused(grpc.StatusCode.ALREADY_EXISTS, "AGENT_EXISTS"):
        client.fork(agent, f"{agent}-fork")


def test_an_id_stands_for_one_request(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(20, seed))
    client.prime(agent, content, request_id=agent)
    for other in (
        lambda: client.prime(agent, token_ids([301]), request_id=agent),
        lambda: client.prime(agent, content, pinned=True, request_id=agent),
        lambda: client.prime(f"{agent}-2", content, request_id=agent),
        lambda: client.extend(agent, content, request_id=agent),
        lambda: client.generate(agent, content, request_id=agent),
        lambda: client.fork(agent, f"{agent}-2", request_id=agent),
    ):
        with refused(*REUSED):
            other()
    assert client.get(agent).revision == 1


def test_a_finished_generate_is_replayed(client: Client, agent: str, seed: int) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "top_logprobs": 2, "request_id": agent}
    fields["sampling"] = v1.SamplingParams(temperature=1)
    first = client.generate(agent, token_ids(some_tokens(600, seed)), **fields)
    again = client.generate(agent, token_ids(some_tokens(600, seed)), **fields)
    assert [event.WhichOneof("event") for event in again.events] == ["started", "delta", "finished"]
    assert again.started == first.started
    assert again.finished == first.finished
    assert (again.text, again.tokens) == (first.text, first.tokens)
    logprobs = [each for delta in first.deltas for each in delta.logprobs]
    assert list(again.deltas[0].logprobs) == logprobs
    assert client.get(agent).revision == 1


def test_one_that_runs_is_joined_from_its_start(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(50, seed))
    fields: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "request_id": agent}
    first = client.stream(agent, content, **fields)
    head = read_deltas(first, 5)
    second = client.stream(agent, content, **fields)
    joined = Answer(list(second))
    rest = Answer(list(first))
    assert joined.tokens == head + rest.tokens
    assert joined.finished == rest.finished
    assert joined.events[0].HasField("started")
    assert client.get(agent).revision == 1
    with refused(*REUSED):
        client.generate(agent, token_ids([301]), request_id=agent)


def test_it_goes_on_as_long_as_one_waits_for_it(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(50, seed))
    fields: dict[str, Any] = {"max_tokens": 100, "ignore_eos": True, "request_id": agent}
    first = client.stream(agent, content, **fields)
    read_deltas(first, 3)
    second = client.stream(agent, content, **fields)
    assert next(second).HasField("started")
    first.cancel()
    assert len(Answer(list(second)).tokens) == 100
    assert client.get(agent).token_count == 150


def test_a_running_prime_is_joined(client: Client, agent: str, seed: int) -> None:
    request = v1.PrimeRequest(agent_id=agent, content=token_ids(some_tokens(3000, seed)), request_id=agent)
    first, second = client.agents.Prime.future(request), client.agents.Prime.future(request)
    assert first.result() == second.result()
    assert client.get(agent).revision == 1


def test_a_cancelled_one_replays_its_tokens_and_ends_so(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(50, seed))
    fields: dict[str, Any] = {"max_tokens": 20_000, "ignore_eos": True, "request_id": agent}
    stream = client.stream(agent, content, **fields)
    tokens = read_deltas(stream, 3)
    stream.cancel()
    await_that(lambda: is_idle(client, agent))  # a call that came before would join it and keep it going
    replays = []
    for _ in range(2):
        with refused(*CANCELLED):
            client.generate(agent, content, **fields)
        replays.append(Answer(list(until_error(client.stream(agent, content, **fields)))))
    for replay in replays:
        assert [event.WhichOneof("event") for event in replay.events] == ["started", "delta"]
        assert replay.tokens[: len(tokens)] == tokens
    kept = client.get(agent)
    assert (kept.revision, kept.token_count) == (1, 50 + len(replays[0].tokens))


def test_what_failed_before_its_commit_is_not_recorded(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(20, seed))
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        client.extend(agent, content, request_id=agent)
    client.prime(agent, content)
    assert client.extend(agent, content, request_id=agent).agent.revision == 2
    stream = client.stream(agent, token_ids(some_tokens(20_000, seed)), request_id=f"{agent}-2")
    assert next(stream).HasField("started")
    stream.cancel()  # while it prefills
    await_that(lambda: is_idle(client, agent))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_TOO_LONG"):
        client.generate(agent, token_ids(some_tokens(40_000, seed)), request_id=f"{agent}-2")
    assert client.generate(agent, content, request_id=f"{agent}-2").finished.agent.revision == 3


def test_one_that_was_cancelled_before_its_commit_is_done_anew(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(3000, seed))
    for _ in range(3):
        stream = client.stream(agent, content, request_id=agent)
        assert next(stream).HasField("started")
        stream.cancel()  # while it prefills
    answer = client.generate(agent, content, request_id=agent, max_tokens=0, ignore_eos=False)
    assert answer.finished.agent.revision == 1


def test_outcomes_survive_kill_9(tmp_path: Path) -> None:
    content = token_ids(some_tokens(300))
    fields: dict[str, Any] = {"max_tokens": 10, "ignore_eos": True, "request_id": "generate"}
    long: dict[str, Any] = {**fields, "max_tokens": 20_000, "request_id": "cancelled"}
    with serving(tmp_path / "data") as (server, client):
        primed = client.prime("a", content, request_id="prime")
        answer = client.generate("a", text(" then"), **fields)
        forked = client.fork("a", "b", request_id="fork")
        stream = client.stream("b", text(" so"), **long)
        read_deltas(stream, 3)
        stream.cancel()
        await_that(lambda: is_idle(client, "b"))  # a call that came before would join it and keep it going
        with refused(*CANCELLED):
            client.generate("b", text(" so"), **long)
        before = [client.get("a"), client.get("b")]
        server.kill()
    with serving(tmp_path / "data") as (_, client):
        assert client.prime("a", content, request_id="prime") == primed
        again = client.generate("a", text(" then"), **fields)
        assert (again.started, again.finished) == (answer.started, answer.finished)
        assert (again.text, again.tokens) == (answer.text, answer.tokens)
        assert client.fork("a", "b", request_id="fork") == forked
        with refused(*CANCELLED):
            client.generate("b", text(" so"), **long)
        with refused(*REUSED):
            client.generate("a", text(" other"), **fields)
        assert [client.get(name).revision for name in "ab"] == [agent.revision for agent in before]


@pytest.mark.parametrize("fields", [{"ephemeral": True}, {"agent_id": ""}], ids=["ephemeral", "without agent"])
def test_it_is_refused_where_nothing_is_kept(client: Client, agent: str, fields: dict[str, Any]) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusals:
        client.generate(**{"agent_id": agent, "content": text("x"), "request_id": "some", **fields})
    assert refusals[0].fields == ["request_id"]


def test_what_a_version_before_has_kept_is_not_done_again(tmp_path: Path) -> None:
    content = token_ids(some_tokens(20))
    with serving(tmp_path / "data") as (server, client):
        client.prime("a", content)
        client.extend("a", content, request_id="r")
        assert server.terminate() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "index.sqlite")) as index, index:
        index.execute("UPDATE outcomes SET payload = ?", (b'{"agent":{"record":{"tenant":"","agent_id":"a"}}}',))
    with serving(tmp_path / "data") as (_, client):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "OUTCOME_UNREADABLE") as refusals:
            client.extend("a", content, request_id="r")
        assert "GetAgent" in refusals[0].message
        assert (client.get("a").revision, client.get("a").token_count) == (2, 40)
