"""What a refusal says to programs: limits, revisions, fields and names, beside the reason."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Server, chat, serving, some_tokens, text, token_ids
from tests.e2e.waiting import await_that
from warmkv import v1
from warmkv.client import Client, WarmKVError

ANY = text("x")
LIMIT = 2048
"""Tokens of a context."""
SOME = "some"
AT_ONCE = [("grpc.enable_retries", 0)]
FORMAT = v1.ResponseFormat


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    """A server with one agent, `held`, at revision 1, and a client of the library that tries nothing twice."""
    folder = tmp_path_factory.mktemp("metadata")
    flags = ("--context-limit", str(LIMIT), "--max-message-bytes", str(1 << 20))
    with serving(folder / "data", *flags) as (server, harness):
        harness.prime("held", token_ids(some_tokens(20)), request_id="first")
        with Client(server.address, options=AT_ONCE) as client:
            yield server, client


def with_image() -> v1.Content:
    part = v1.ContentPart(image=b"\x89PNG")
    return v1.Content(chat=v1.ChatMessages(messages=[v1.ChatMessage(role="user", parts=[part])]))


REFUSALS: dict[str, tuple[Callable[[Client], Any], str, Mapping[str, str]]] = {
    "a field": (lambda c: c.chat("?", ANY), "INVALID_FIELD", {"field": "agent_id"}),
    "the first of several": (
        lambda c: c.chat("a", ANY, stop=["a"] * 17, top_logprobs=99),
        "INVALID_FIELD",
        {"field": "stop", "limit": "16", "actual": "17", "unit": "strings"},
    ),
    "characters": (
        lambda c: c.prime("a", ANY, request_id="x" * 129),
        "INVALID_FIELD",
        {"field": "request_id", "limit": "128", "actual": "129", "unit": "characters"},
    ),
    "bytes of a string": (
        lambda c: c.get("x" * 70_000),
        "INVALID_FIELD",
        {"field": "agent_id", "limit": "65536", "actual": "70000", "unit": "bytes"},
    ),
    "a token": (lambda c: c.prime("a", token_ids([5, -1])), "INVALID_FIELD", {"field": "content.token_ids.ids[1]"}),
    "a role": (
        lambda c: c.prime("a", chat(("r" * 65, "x"))),
        "INVALID_FIELD",
        {"field": "content.chat.messages[0].role", "limit": "64", "actual": "65", "unit": "characters"},
    ),
    "no content": (lambda c: c.prime("a", text("")), "EMPTY_CONTENT", {"field": "content"}),
    "a context": (
        lambda c: c.extend("held", token_ids([300] * LIMIT)),
        "CONTEXT_TOO_LONG",
        {"limit": str(LIMIT), "actual": str(LIMIT + 20), "unit": "tokens"},
    ),
    "ids that no context holds": (
        lambda c: c.prime("a", token_ids([300] * (LIMIT + 1))),
        "CONTEXT_TOO_LONG",
        {"field": "content.token_ids.ids", "limit": str(LIMIT), "actual": str(LIMIT + 1), "unit": "tokens"},
    ),
    "a message": (
        lambda c: c.prime("a", text("x" * (1 << 20))),
        "MESSAGE_TOO_LARGE",
        {"limit": str(1 << 20), "actual": SOME, "unit": "bytes"},
    ),
    "nobody": (lambda c: c.get("nobody"), "AGENT_NOT_FOUND", {"agent_id": "nobody"}),
    "nobody to extend": (lambda c: c.extend("nobody", ANY), "AGENT_NOT_FOUND", {"agent_id": "nobody"}),
    "somebody": (lambda c: c.fork("held", "held"), "AGENT_EXISTS", {"agent_id": "held"}),
    "a revision": (
        lambda c: c.extend("held", ANY, expected_revision=7),
        "REVISION_MISMATCH",
        {"revision": "1", "expected_revision": "7"},
    ),
    "a revision of nobody's": (
        lambda c: c.chat("nobody", ANY, expected_revision=7),
        "REVISION_MISMATCH",
        {"revision": "0", "expected_revision": "7"},
    ),
    "a request_id": (lambda c: c.prime("held", ANY, request_id="first"), "REQUEST_ID_REUSED", {"request_id": "first"}),
    "an image": (
        lambda c: c.prime("a", with_image()),
        "UNSUPPORTED",
        {"field": "content.chat.messages[0].parts[0].image"},
    ),
    "a schema": (
        lambda c: c.chat("a", ANY, response_format=FORMAT(json_schema='{"not": {}}')),
        "UNSUPPORTED",
        {"field": "response_format.json_schema"},
    ),
    "too many alternatives": (
        lambda c: c.chat("a", ANY, response_format=FORMAT(json_schema=f'{{"enum": {list(range(6000))}}}')),
        "CONSTRAINT_TOO_COMPLEX",
        {"field": "response_format.json_schema", "limit": "5000", "unit": SOME},
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_it_to_programs(place: tuple[Server, Client], name: str) -> None:
    call, reason, metadata = REFUSALS[name]
    with pytest.raises(WarmKVError) as caught:
        call(place[1])
    error = caught.value
    assert error.reason == reason, error
    assert {key: SOME if metadata.get(key) == SOME else value for key, value in error.metadata.items()} == metadata


def test_a_time_to_come_back(tmp_path: Path) -> None:
    """Where the queue is full, and where the server stops."""
    with serving(tmp_path / "data", "--max-queue", "1") as (server, harness):
        running = harness.stream("a", token_ids(some_tokens(20)), max_tokens=20_000, ignore_eos=True)
        assert next(running).HasField("started")
        waiting = harness.agents.Prime.future(v1.PrimeRequest(agent_id="a", content=ANY))
        await_that(lambda: harness.stats().gauges.queue_depth == 1)
        with Client(server.address, options=AT_ONCE) as client:
            with pytest.raises(WarmKVError) as caught:
                client.prime("a", ANY)
            assert caught.value.reason == "QUEUE_FULL"
            assert caught.value.metadata == {"limit": "1", "actual": "1", "unit": "requests", "retry_delay": "1s"}
            assert caught.value.retry_after == 1.0
            server.signal(signal.SIGTERM)
            await_that(lambda: harness.health_of() != "SERVING")
            with pytest.raises(WarmKVError) as caught:
                client.get("a")
            assert (caught.value.reason, caught.value.metadata) == ("DRAINING", {"retry_delay": "5s"})
        running.cancel()
        assert waiting.result().agent.agent_id == "a"
        assert server.wait() == 0
