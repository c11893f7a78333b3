"""PrimeStream and ExtendStream are Prime and Extend that say how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
import pytest

from tests.e2e.harness import RPC_SECONDS, Client, Server, refusal_of, refused, some_tokens, text, token_ids
from tests.e2e.waiting import await_that, found
from warmkv import client as library
from warmkv import v1

LONG = 2000
"""Tokens: some steps of the engine."""


def prime_stream(client: Client, agent: str, content: v1.Content | None, **fields: Any) -> Any:
    request = v1.PrimeStreamRequest(agent_id=agent, content=content, **fields)
    return client.agents.PrimeStream(request, timeout=RPC_SECONDS, metadata=client.metadata)


def extend_stream(client: Client, agent: str, content: v1.Content | None, **fields: Any) -> Any:
    request = v1.ExtendStreamRequest(agent_id=agent, content=content, **fields)
    return client.agents.ExtendStream(request, timeout=RPC_SECONDS, metadata=client.metadata)


def until_it_computes(stream: Any) -> v1.PrimeProgress:
    for event in stream:
        progress: v1.PrimeProgress = event.progress
        if progress.tokens_done:
            return progress
    pytest.fail("the stream ended before it computed anything")


def done_in_order(events: Iterable[Any], total: int) -> None:
    """Progress that only grows, and the response as the last event and no other."""
    *told, last = events
    assert [each.WhichOneof("event") for each in told] == ["progress"] * len(told)
    assert last.HasField("response")
    computed = [each.progress for each in told if each.progress.activity == v1.ACTIVITY_PREFILLING]
    assert {each.tokens_total for each in computed} == {total}
    done = [each.tokens_done for each in computed]
    assert done == sorted(done)
    assert len(set(done)) > 2
    assert done[-1] <= total


def test_progress_and_last_the_response(client: Client, agent: str, seed: int) -> None:
    tokens = some_tokens(LONG, seed)
    primed = list(prime_stream(client, agent, token_ids(tokens), labels={"of": "stream"}))
    done_in_order(primed, LONG)
    response = primed[-1].response
    assert response.persisted
    assert response.cache.prefilled_tokens == LONG
    assert (response.agent.revision, response.agent.labels["of"]) == (1, "stream")
    assert client.prime(agent, token_ids(tokens)).agent.revision == 1
    more = some_tokens(LONG, seed + 1)
    extended = list(extend_stream(client, agent, token_ids(more)))
    done_in_order(extended, LONG)
    response = extended[-1].response
    assert (response.cache.cached_tokens, response.agent.token_count) == (LONG, 2 * LONG)
    (again,) = (each for each in prime_stream(client, agent, token_ids(tokens + more)) if each.HasField("response"))
    assert again.response.agent.revision == 2


def test_an_agent_that_is_primed_for_the_first_time_is_seen(client: Client, agent: str, seed: int) -> None:
    stream = prime_stream(client, agent, token_ids(some_tokens(20_000, seed)))
    far = until_it_computes(stream)
    seen = client.get(agent)
    assert (seen.agent_id, seen.revision, seen.token_count, seen.tier) == (agent, 0, 0, v1.TIER_HOT)
    assert seen.activity == v1.ACTIVITY_PREFILLING
    assert far.tokens_done <= seen.tokens_done <= seen.tokens_total == 20_000
    assert not seen.HasField("create_time")
    pages, page_token = list[str](), ""
    while not pages or page_token:
        page = client.list(page_size=1, page_token=page_token)
        pages += [each.agent_id for each in page.agents]
        page_token = page.next_page_token
    assert pages.count(agent) == 1
    assert pages == sorted(pages)
    # There is nothing yet that could be copied, changed or refused to.
    not_found = grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"
    calls: list[Callable[[], Any]] = [
        lambda: client.fork(agent, f"{agent}-2"),
        lambda: client.update(v1.Agent(agent_id=agent, pinned=True), "pinned"),
    ]
    for call in calls:
        with refused(*not_found):
            call()
    stream.cancel()
    await_that(lambda: not found(client, agent))
    with refused(*not_found):
        client.get(agent)


def test_a_delete_ends_it(client: Client, agent: str, seed: int) -> None:
    stream = prime_stream(client, agent, token_ids(some_tokens(20_000, seed)))
    until_it_computes(stream)
    client.delete(agent)
    with refused(grpc.StatusCode.ABORTED, "AGENT_DELETED"):
        list(stream)
    assert not found(client, agent)


def test_one_request_id_for_both(client: Client, agent: str, seed: int) -> None:
    """What one has begun the other joins, and what one has done the other answers."""
    content = token_ids(some_tokens(LONG, seed))
    stream = prime_stream(client, agent, content, request_id=f"{agent}-p")
    until_it_computes(stream)
    joined = client.agents.Prime.future(
        v1.PrimeRequest(agent_id=agent, content=content, request_id=f"{agent}-p"), timeout=RPC_SECONDS
    )
    *_, last = stream
    assert joined.result() == last.response
    (only,) = prime_stream(client, agent, content, request_id=f"{agent}-p")
    assert only.response == last.response
    extended = client.extend(agent, token_ids([300]), request_id=f"{agent}-e")
    (only,) = extend_stream(client, agent, token_ids([300]), request_id=f"{agent}-e")
    assert only.response == extended
    reused = grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"
    with refused(*reused):
        list(prime_stream(client, agent, content, request_id=f"{agent}-p", pinned=True))
    with refused(*reused):
        list(extend_stream(client, agent, token_ids([300]), request_id=f"{agent}-p"))


WRONG: dict[str, tuple[v1.Content | None, dict[str, Any]]] = {
    "no content": (None, {}),
    "a token": (token_ids([-1]), {"expected_revision": -1}),
    "the revision": (text("x"), {"expected_revision": 7}),
    "too long": (token_ids([300] * 40_000), {}),
    "the request_id": (text("x"), {"request_id": "x" * 129}),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals_are_the_same(client: Client, agent: str, name: str) -> None:
    content, fields = WRONG[name]
    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (client.prime, prime_stream),
        (client.extend, extend_stream),
    ]
    for whole, streamed in pairs:
        with pytest.raises(grpc.RpcError) as one:
            whole(agent, content, **fields)
        with pytest.raises(grpc.RpcError) as other:
            list(streamed(client, agent, content, **fields))
        assert refusal_of(one.value) == refusal_of(other.value)
        assert refusal_of(one.value).reason


def test_a_deadline_ends_it(client: Client, agent: str, seed: int) -> None:
    request = v1.PrimeStreamRequest(agent_id=agent, content=token_ids(some_tokens(20_000, seed)))
    with pytest.raises(grpc.RpcError) as caught:
        list(client.agents.PrimeStream(request, timeout=0.3))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await_that(lambda: not found(client, agent))


def test_the_library_tells_of_it(server: Server, agent: str, seed: int) -> None:
    told: list[v1.PrimeProgress] = []
    with library.Client(server.address) as client:
        primed = client.prime(agent, token_ids(some_tokens(LONG, seed)), on_progress=told.append)
        assert primed.agent.revision == 1
        assert told[-1].tokens_done > LONG // 2
        extended = client.extend(agent, token_ids([300]), on_progress=told.append)
        assert extended.agent.token_count == LONG + 1

        def give_up(progress: v1.PrimeProgress) -> None:
            if progress.tokens_done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            client.prime(f"{agent}-2", token_ids(some_tokens(20_000, seed + 1)), on_progress=give_up)
        await_that(lambda: f"{agent}-2" not in [each.agent_id for each in client.agents()])
        with pytest.raises(library.WarmKVError, match=r"ExtendStream: NOT_FOUND \(AGENT_NOT_FOUND\)"):
            client.extend("nobody", token_ids([300]), on_progress=told.append)


async def test_the_library_tells_of_it_with_an_event_loop(server: Server, agent: str, seed: int) -> None:
    told: list[v1.PrimeProgress] = []
    async with library.AsyncClient(server.address) as client:
        primed = await client.prime(agent, token_ids(some_tokens(LONG, seed)), on_progress=told.append)
        extended = await client.extend(agent, token_ids([300]), on_progress=told.append)
    assert (primed.agent.revision, extended.agent.revision) == (1, 2)
    assert max(each.tokens_done for each in told) > LONG // 2
