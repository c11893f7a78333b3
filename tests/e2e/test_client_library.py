"""`warmkv.client` against a real server: answers, errors, and a server that goes away and comes back."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import Client as Harness
from tests.e2e.harness import Server, free_port, serving, some_tokens
from tests.e2e.test_access import TLS
from warmkv import v1
from warmkv.client import AsyncClient, Client, WarmKVError, chat, text, tokens

CERTIFICATE, KEY = TLS / "certificate.pem", TLS / "key.pem"


def test_a_conversation(server: Server, agent: str) -> None:
    with Client(server.address) as client:
        client.prime(agent, chat(("system", "You are a helpful assistant.")))
        with client.stream(agent, "Hello! My name is Grace.") as stream:
            pieces = list(stream)
        assert len(pieces) > 1
        assert "".join(pieces) == stream.answer.text
        answer = client.chat(agent, "What is my name?")
        assert "Grace" in answer.text
        assert (answer.cache.source, answer.finished.persisted) == (v1.CACHE_SOURCE_HOT, True)
        assert answer.agent.token_count == answer.finished.usage.prompt_tokens + len(answer.token_ids)
        assert client.fork(agent, f"{agent}-2").parent_agent_id == agent
        assert client.evict(agent).agent.tier == v1.TIER_WARM
        assert client.update(v1.Agent(agent_id=agent, pinned=True), ["pinned"]).pinned
        assert {agent, f"{agent}-2"} <= {each.agent_id for each in client.agents(page_size=1)}
        client.delete(agent)
        client.delete(agent, allow_missing=True)
        assert client.count_tokens(text("Hello")) > 0
        assert client.stats().gauges.batch_size == 0


async def test_the_same_with_an_event_loop(server: Server, agent: str) -> None:
    async with AsyncClient(server.address) as client:
        await client.prime(agent, chat(("system", "You are a helpful assistant.")))
        async with client.stream(agent, "Hello! My name is Grace.") as stream:
            pieces = [piece async for piece in stream]
        assert "".join(pieces) == stream.answer.text
        assert "Grace" in (await client.chat(agent, "What is my name?")).text
        await client.fork(agent, f"{agent}-2")
        assert {agent, f"{agent}-2"} <= {each.agent_id async for each in client.agents(page_size=1)}
        with pytest.raises(WarmKVError) as caught:
            await client.get("nobody")
        assert caught.value.reason == "AGENT_NOT_FOUND"


def test_an_error_says_what_the_server_said(server: Server, agent: str) -> None:
    with Client(server.address) as client:
        with pytest.raises(WarmKVError) as caught:
            client.chat(agent, "x", top_logprobs=99, stop=[""])
        error = caught.value
        assert (error.rpc, error.code, error.reason) == (
            "Generate",
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
        )
        assert {"top_logprobs", "stop[0]"} <= error.fields.keys()
        assert "top_logprobs" in error.message
        with pytest.raises(WarmKVError, match=r"Extend: NOT_FOUND \(AGENT_NOT_FOUND\)"):
            client.extend("nobody", text("x"))
        with pytest.raises(WarmKVError) as caught:
            client.chat(agent, tokens(some_tokens(200)), max_tokens=20_000, ignore_eos=True, timeout=0.5)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "")


def test_an_answer_that_is_cancelled_is_kept_so_far(server: Server, agent: str) -> None:
    with Client(server.address) as client:
        with client.stream(agent, tokens(some_tokens(50)), max_tokens=20_000, ignore_eos=True) as stream:
            for event in stream.events():
                if event.HasField("delta"):
                    break
        client.extend(agent, text(" x"))  # behind it, at its turn
        assert client.get(agent).token_count > 51


def test_tls_and_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("ours secret-1\n")
    flags = ("--tls-cert", str(CERTIFICATE), "--tls-key", str(KEY), "--token-file", str(tmp_path / "tokens"))
    server = Server(tmp_path / "data", *flags)
    try:
        with Client(server.address, token="secret-1", tls_ca=CERTIFICATE) as client:
            assert client.chat("a", "Hello!", max_tokens=4).text
        with Client(server.address, token="guess", tls_ca=CERTIFICATE) as client:
            with pytest.raises(WarmKVError) as caught:
                client.get("a")
            assert caught.value.reason == "TOKEN_INVALID"
            assert "guess" not in repr(caught.value)
    finally:
        server.kill()


def test_a_server_that_is_killed_and_started_again(tmp_path: Path) -> None:
    """One client goes on; what was asked twice with one id was done once."""
    port = str(free_port())
    with serving(tmp_path / "data", "--port", port) as (server, _), Client(server.address) as client:
        first = client.chat("a", "Hello! My name is Grace.", request_id="one")
        server.kill()
        with pytest.raises(WarmKVError) as caught:
            client.get("a")
        assert caught.value.is_unavailable
        assert caught.value.reason == ""
        began: list[Server] = []
        starter = threading.Thread(target=lambda: began.append(Server(tmp_path / "data", "--port", port)))
        starter.start()
        try:
            assert client.wait_until_ready(120).model_id == "builtin:tiny"
            again = client.chat("a", "Hello! My name is Grace.", request_id="one")
            assert (again.text, again.agent.revision) == (first.text, 1)
            answer = client.chat("a", "What is my name?")
            assert answer.cache.source == v1.CACHE_SOURCE_WARM
            assert "Grace" in answer.text
        finally:
            starter.join()
            for server in began:
                server.kill()


def test_what_cannot_be_reached_is_not_waited_for_longer_than_said() -> None:
    with Client(f"127.0.0.1:{free_port()}") as client, pytest.raises(WarmKVError) as caught:
        client.wait_until_ready(0.5)
    assert caught.value.is_unavailable


def test_the_raw_stubs_are_at_hand(server: Server, agent: str) -> None:
    with Client(server.address) as client, Harness(server.address) as other:
        request = v1.PrimeRequest(agent_id=agent, content=text("Some text"))
        client.agent_service.Prime(request, metadata=client.metadata)
        assert other.get(agent).revision == 1
