"""The log's line for each request, in both forms; and that nobody's words are in it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.harness import Client, Server, chat, refused, text
from tests.e2e.waiting import await_that, read_deltas
from warmkv import v1
from warmkv_server.service.request_log import Asked, RequestLog

SECRET = "xylophone"


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    (tmp_path / "tokens").write_text("red red-token\nblue blue-token team1-\n")
    return tmp_path / "tokens"


def objects(server: Server) -> Iterator[Any]:
    return (json.loads(line) for line in server.log_text().splitlines() if line.startswith("{"))


def test_a_session_in_json(tmp_path: Path, tenants: Path) -> None:
    """At debug, every kind of request, answered and refused: a line for each, and no word of anybody's."""
    flags = ["--log-format", "json", "--log-level", "debug", "--token-file", str(tenants)]
    server = Server(tmp_path / "data", *flags)
    try:
        with Client(server.address, token="red-token") as client:
            client.prime("ada", chat(("system", f"You know of the {SECRET}.")), request_id="prime-1")
            client.extend("ada", text(f" The {SECRET} is in the drawer."))
            answer = client.generate("ada", chat(("user", f"Where is the {SECRET}?")), max_tokens=9)
            client.fork("ada", "bob")
            client.evict("ada")
            client.update(v1.Agent(agent_id="bob", labels={"about": SECRET}), "labels")
            client.get("bob")
            client.list(labels={"about": SECRET})
            client.count(text(SECRET))
            client.info()
            client.stats()
            client.delete("bob")
            stream = client.stream("ada", text(f" {SECRET}"), max_tokens=20_000, ignore_eos=True)
            read_deltas(stream, 1)
            stream.cancel()
            for wrong in (f"the {SECRET}", ""):
                with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
                    client.prime(wrong, text(SECRET), request_id=f"{SECRET} " * 20)
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
                client.generate("ada", chat((SECRET, SECRET)), stop=[""])
            await_that(lambda: sum(each.get("rpc") == "Generate" for each in objects(server)) == 3)
        with Client(server.address, token="blue-token") as blue, refused(*FORBIDDEN):
            blue.get("ada")
        with Client(server.address, token="a-guess") as stranger, refused(*UNKNOWN):
            stranger.get("ada")
        assert server.terminate() == 0
    finally:
        server.process.kill()
    log = server.log_text()
    assert SECRET not in log
    assert not {"red-token", "blue-token", "a-guess"} & set(re.findall(r"[\w-]+", log))
    found = [each for each in objects(server) if "rpc" in each]
    assert [each["rpc"] for each in found] == [
        *("Prime", "Extend", "Generate", "ForkAgent", "EvictAgent", "UpdateAgent", "GetAgent", "ListAgents"),
        *("CountTokens", "GetServerInfo", "GetServerStats", "DeleteAgent", "Generate", "Prime", "Prime", "Generate"),
        *("GetAgent", "GetAgent"),
    ]
    assert {each["level"] for each in found[:-1]} == {"info"}
    assert (found[0]["id"], found[0]["tenant"], found[0]["agent"]) == ("prime-1", "red", "ada")
    generated = found[2]
    cache, timings = answer.cache, answer.finished.timings
    assert generated["status"] == "OK"
    assert generated["source"] == "hot"
    assert [generated[name] for name in ("prompt", "cached", "prefilled", "completion", "loaded_bytes")] == [
        *(cache.prompt_tokens, cache.cached_tokens, cache.prefilled_tokens),
        *(answer.finished.usage.completion_tokens, cache.bytes_loaded),
    ]
    for name, duration in (("first_token_ms", timings.first_token), ("commit_ms", timings.commit)):
        assert generated[name] == pytest.approx(duration.ToNanoseconds() / 1e6, abs=0.01)
    assert generated["ms"] >= generated["first_token_ms"]
    assert generated["persisted"] is True
    assert found[12]["status"] == "CANCELLED"
    assert {(each["agent"], each["reason"]) for each in found[13:15]} == {("", "INVALID_FIELD")}
    assert (found[16]["tenant"], found[16]["reason"]) == ("blue", "AGENT_FORBIDDEN")
    assert (found[17]["level"], found[17]["reason"]) == ("warning", "TOKEN_INVALID")
    assert found[17]["peer"].startswith("ipv4:127.0.0.1:")
    assert len({each["id"] for each in found}) == len(found)


FORBIDDEN = (grpc.StatusCode.PERMISSION_DENIED, "AGENT_FORBIDDEN")
UNKNOWN = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")


def test_lines_for_people(server: Server, client: Client, agent: str) -> None:
    client.prime(agent, text("Some text"), request_id="two words\nand a line")

    def lines() -> list[str]:
        return [each for each in server.log_text().splitlines() if f"agent={agent} " in each]

    await_that(lambda: bool(lines()))  # it is written when the answer has gone
    (line,) = lines()
    assert "INFO warmkv_server.service.request_log: rpc=Prime id='two words\\nand a line' tenant='' agent=" in line
    assert re.search(
        r"status=OK ms=[\d.]+ source=\w+ prompt=\d+ .* commit_ms=[\d.]+ loaded_bytes=0 persisted=yes$", line
    )


def test_a_stream_of_progress_has_the_line_of_what_it_streams(server: Server, client: Client, agent: str) -> None:
    stream = client.agents.PrimeStream(v1.PrimeStreamRequest(agent_id=agent, content=text("Some text")))
    *_, last = stream
    named = f"rpc=PrimeStream id=-[0-9a-f]+ tenant='' agent={agent} status=OK ms="
    cost = f"prompt={last.response.cache.prompt_tokens} .* commit_ms=[\\d.]+ loaded_bytes=0 persisted=yes"
    await_that(lambda: re.search(f"{named}.* {cost}$", server.log_text(), re.MULTILINE) is not None)


def test_who_guesses_tokens_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now = [5.0]
    requests = RequestLog(lambda: now[0])
    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            requests.ended(Asked("GetAgent", "ipv4:1.2.3.4:5"), grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
        assert len(caplog.messages) == 10
        assert all("peer=ipv4:1.2.3.4:5" in each for each in caplog.messages)
        now[0] = 6.5
        requests.ended(Asked("GetAgent", "ipv4:1.2.3.4:5"), grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
    assert "990 more calls were refused" in caplog.messages[10]
    assert len(caplog.messages) == 12
