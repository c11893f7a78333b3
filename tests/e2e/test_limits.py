"""A context ends at its limit, and what can't fit is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import Client, refused, serving, some_tokens, text, token_ids
from tests.e2e.waiting import await_that
from warmkv import v1

TOO_LONG = (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_TOO_LONG")
LIMIT = 64


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("small") / "data", "--context-limit", str(LIMIT)) as (_, client):
        yield client


def test_a_prompt_up_to_the_limit_is_taken_and_one_more_is_not(small: Client, agent: str) -> None:
    assert small.info().context_limit == LIMIT
    assert small.prime(agent, token_ids(some_tokens(LIMIT))).agent.token_count == LIMIT
    prefilled = small.stats().counters.prefilled_tokens
    for call in (small.prime, small.generate):
        with refused(*TOO_LONG):
            call(agent, token_ids(some_tokens(LIMIT + 1)), **_replace(call == small.generate))
    with refused(*TOO_LONG):
        small.extend(agent, token_ids([301]))
    with refused(*TOO_LONG):
        small.generate(agent, token_ids([301]))
    assert small.stats().counters.prefilled_tokens == prefilled
    assert small.get(agent).revision == 1


def _replace(generate: bool) -> dict[str, object]:
    return {"context_mode": v1.CONTEXT_MODE_REPLACE} if generate else {}


def test_an_answer_that_reaches_the_limit_ends_there(small: Client, agent: str) -> None:
    answer = small.generate(agent, token_ids(some_tokens(LIMIT - 5)), max_tokens=2**31 - 1)
    assert answer.finished.finish_reason == v1.FINISH_REASON_LENGTH
    assert answer.finished.usage.completion_tokens == 5
    assert answer.finished.agent.token_count == LIMIT


def test_a_full_context_leaves_no_room_for_an_answer(small: Client, agent: str) -> None:
    full = small.generate(agent, token_ids(some_tokens(LIMIT)), max_tokens=50)
    assert full.finished.finish_reason == v1.FINISH_REASON_LENGTH
    assert full.finished.usage.completion_tokens == 0
    assert (full.text, full.tokens) == ("", [])
    assert full.finished.agent.token_count == LIMIT
    assert small.generate(agent).finished.usage.completion_tokens == 0
    assert small.get(agent).revision == 1


def test_a_request_that_can_never_fit_in_memory_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    budget = (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_BUDGET")
    with serving(tmp_path / "data") as (_, client):
        client.prime("held", token_ids(some_tokens(2000)))
    with serving(tmp_path / "data", "--inflight-bytes", "12MiB") as (_, client):
        with refused(*budget) as refusals:
            client.prime("a", token_ids(some_tokens(2000, seed=1)))
        assert "--inflight-bytes" in refusals[0].message
        assert refusals[0].retry_seconds is None  # waiting doesn't help
        told = refusals[0].metadata
        assert (told["limit"], told["unit"]) == (str(12 << 20), "bytes")
        assert int(told["actual"]) > 12 << 20
        with refused(*budget):
            client.generate("held", token_ids([301]))
        with refused(*budget):
            client.generate("b", text("A short one"), max_tokens=20_000)
        counters = client.stats().counters
        assert (counters.prefilled_tokens, counters.bytes_loaded) == (0, 0)
        assert client.prime("held", token_ids(some_tokens(2000))).cache.cached_tokens == 2000  # nothing to compute
        assert client.generate("b", text("A short one fits.")).finished.agent.revision == 1


def test_more_waiting_than_the_queue_holds_is_refused_with_a_time_to_come_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = tmp_path_factory.mktemp("queue") / "data"
    with serving(data, "--max-queue", "2") as (_, client):
        running = client.stream("a", token_ids(some_tokens(20)), max_tokens=20_000, ignore_eos=True)
        assert next(running).WhichOneof("event") == "started"
        waiting = [client.agents.Prime.future(v1.PrimeRequest(agent_id="a", content=text("x"))) for _ in range(2)]
        await_that(lambda: client.stats().gauges.queue_depth == 2)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL") as refusals:
            client.prime("a", text("one too many"))
        assert refusals[0].retry_seconds == 1.0
        assert client.prime("b", text("another agent is free")).agent.revision == 1
        running.cancel()
        assert all(future.result().agent.agent_id == "a" for future in waiting)


def test_a_page_of_agents_fits_into_what_clients_take(tmp_path: Path) -> None:
    """Whatever their labels: 60 agents with the largest there are have more than 4 MiB."""
    labels = {f"{n:02}" + "\U0001f600" * 61: "\U0001f600" * 255 for n in range(64)}
    with serving(tmp_path / "data") as (_, client):
        client.prime("agent-00", token_ids(some_tokens(5)), labels=labels)
        for number in range(1, 60):
            client.fork("agent-00", f"agent-{number:02}")
        page, seen = client.list(page_size=1000), list[str]()
        while True:
            assert page.ByteSize() < 4 << 20
            seen += [agent.agent_id for agent in page.agents]
            if not page.next_page_token:
                break
            page = client.list(page_size=1000, page_token=page.next_page_token)
        assert seen == [f"agent-{number:02}" for number in range(60)]
