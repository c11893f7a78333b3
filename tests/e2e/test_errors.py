"""Every wrong request gets its code and its reason, and every wrong field is named."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.e2e.harness import Client, Server, chat, refusal_of, refused, serving, some_tokens, text, token_ids
from tests.engine.families import FAMILIES, build
from tests.engine.folders import write_model
from warmkv import v1

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
ANY = text("x")


def sampling(**fields: Any) -> Callable[[Client], Any]:
    return lambda client: client.generate("a", ANY, sampling=v1.SamplingParams(**fields))


def generate(**fields: Any) -> Callable[[Client], Any]:
    return lambda client: client.generate("a", ANY, **fields)


WRONG: dict[str, tuple[Callable[[Client], Any], list[str]]] = {
    "no agent_id": (lambda c: c.prime("", ANY), ["agent_id"]),
    "long agent_id": (lambda c: c.prime("a" * 129, ANY), ["agent_id"]),
    "slash": (lambda c: c.extend("../a", ANY), ["agent_id"]),
    "space": (lambda c: c.generate("a b", ANY), ["agent_id"]),
    "umlaut": (lambda c: c.get("ä"), ["agent_id"]),
    "newline": (lambda c: c.delete("a\n"), ["agent_id"]),
    "evict": (lambda c: c.evict(""), ["agent_id"]),
    "fork": (lambda c: c.fork("", "?"), ["source_agent_id", "agent_id"]),
    "token ids": (lambda c: c.prime("a", token_ids([1, -1, 5, 2**31 - 1])), ["[1]", "[3]"]),
    "role": (lambda c: c.prime("a", chat(("user", "x"), ("", "y"))), ["content.chat.messages[1].role"]),
    "ttl": (lambda c: c.prime("a", ANY, ttl=Duration()), ["ttl"]),
    "negative ttl": (lambda c: c.prime("a", ANY, ttl=Duration(seconds=-1)), ["ttl"]),
    "endless ttl": (lambda c: c.prime("a", ANY, ttl=Duration(seconds=10**11)), ["ttl"]),
    "label key": (lambda c: c.prime("a", ANY, labels={"": "x"}), ["labels['']"]),
    "label value": (lambda c: c.prime("a", ANY, labels={"k": "x" * 256}), ["labels['k']"]),
    "labels": (lambda c: c.prime("a", ANY, labels={str(n): "" for n in range(65)}), ["labels"]),
    "revision": (lambda c: c.prime("a", ANY, expected_revision=-1), ["expected_revision"]),
    "request_id": (lambda c: c.extend("a", ANY, request_id="x" * 129), ["request_id"]),
    "revision without agent": (lambda c: c.generate("", ANY, expected_revision=1), ["expected_revision"]),
    "context_mode": (generate(context_mode=99), ["context_mode"]),
    "stream_mode": (generate(stream_mode=99), ["stream_mode"]),
    "max_tokens": (generate(max_tokens=-1), ["max_tokens"]),
    "empty stop": (generate(stop=["a", ""]), ["stop[1]"]),
    "many stops": (generate(stop=["a"] * 17), ["stop"]),
    "top_logprobs": (generate(top_logprobs=21), ["top_logprobs"]),
    "negative top_logprobs": (generate(top_logprobs=-1), ["top_logprobs"]),
    "temperature": (sampling(temperature=-0.1), ["sampling.temperature"]),
    "no temperature": (sampling(temperature=float("nan")), ["sampling.temperature"]),
    "endless temperature": (sampling(temperature=float("inf")), ["sampling.temperature"]),
    "top_p": (sampling(top_p=0), ["sampling.top_p"]),
    "top_p above": (sampling(top_p=1.1), ["sampling.top_p"]),
    "top_k": (sampling(top_k=-1), ["sampling.top_k"]),
    "min_p": (sampling(min_p=1.5), ["sampling.min_p"]),
    "repetition": (sampling(repetition_penalty=0), ["sampling.repetition_penalty"]),
    "presence": (sampling(presence_penalty=3), ["sampling.presence_penalty"]),
    "frequency": (sampling(frequency_penalty=float("nan")), ["sampling.frequency_penalty"]),
    "bias token": (sampling(logit_bias={-1: 1}), ["sampling.logit_bias[-1]"]),
    "bias": (sampling(logit_bias={5: 101}), ["sampling.logit_bias[5]"]),
    "page_size": (lambda c: c.list(page_size=-1), ["page_size"]),
    "page_token": (lambda c: c.list(page_token="?"), ["page_token"]),
    "tier": (lambda c: c.list(tier=99), ["tier"]),
    "no mask": (lambda c: c.update(v1.Agent(agent_id="a")), ["update_mask"]),
    "mask": (lambda c: c.update(v1.Agent(agent_id="a"), "pinned", "revision"), ["update_mask"]),
    "update": (lambda c: c.update(v1.Agent(ttl=Duration()), "ttl"), ["agent.agent_id", "agent.ttl"]),
    "count": (lambda c: c.count(token_ids([-1]), context_mode=99), ["context_mode", "[0]"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(client: Client, name: str) -> None:
    call, fields = WRONG[name]
    with refused(*INVALID) as refusals:
        call(client)
    assert len(refusals[0].fields) == len(fields)
    assert all(found.endswith(field) for found, field in zip(refusals[0].fields, fields, strict=True))
    assert refusals[0].metadata["field"] == refusals[0].fields[0]


def test_all_wrong_fields_are_named_at_once(client: Client) -> None:
    with refused(*INVALID) as refusals:
        client.generate(
            "not an id",
            token_ids([-1]),
            max_tokens=-1,
            stop=[""],
            sampling=v1.SamplingParams(temperature=-1, top_p=2),
            expected_revision=-1,
        )
    assert sorted(refusals[0].fields) == [
        "agent_id",
        "content.token_ids.ids[0]",
        "expected_revision",
        "max_tokens",
        "sampling.temperature",
        "sampling.top_p",
        "stop[0]",
    ]


def test_a_status_stays_small_however_much_is_wrong(client: Client) -> None:
    labels = {chr(0x1F600) * 200 + str(n): "x" * 300 for n in range(70)}
    with refused(*INVALID) as refusals:
        client.prime("ä" * 5000, token_ids([-1] * 10_000), labels=labels)
    assert 3 < len(refusals[0].fields) < 10_000
    assert len(refusals[0].message) <= 300


@pytest.mark.parametrize("content", [None, text(""), token_ids([]), chat()], ids=["none", "text", "ids", "chat"])
def test_content_is_needed(client: Client, agent: str, content: v1.Content | None) -> None:
    empty = (grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_CONTENT")
    for call in (client.prime, client.extend):
        with refused(*empty) as refusals:
            call(agent, content)
        assert refusals[0].fields == ["content"]


def test_a_chat_that_the_template_refuses(client: Client, agent: str) -> None:
    for wrong, messages in enumerate((chat(("nobody", "x")), chat(("user", "x"), ("wizard", "y")))):
        try:
            client.prime(agent, messages)
        except grpc.RpcError:
            with refused(*INVALID) as refusals:
                client.prime(agent, messages)
            assert refusals[0].fields == [f"content.chat.messages[{wrong}]"]


@pytest.mark.parametrize("method", ["AgentService/Prime", "AgentService/Generate", "ServerService/CountTokens"])
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["garbage", "not UTF-8"])
def test_bytes_that_are_no_message(client: Client, method: str, data: bytes) -> None:
    path = f"/warmkv.v1.{method}"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE"):
        if method.endswith("Generate"):
            list(client.call(path, data, streaming=True))
        else:
            client.call(path, data)


def test_a_message_that_is_too_large(client: Client, agent: str) -> None:
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"):
        client.prime(agent, text("x" * (17 << 20)))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"):
        client.generate(agent, text("x" * (17 << 20)))


def test_an_rpc_that_is_not_there(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("/warmkv.v1.AgentService/Nothing", b"")
    assert refusal_of(caught.value).code is grpc.StatusCode.UNIMPLEMENTED


def test_a_router_that_hashed_another_agent(server: Server, agent: str, seed: int) -> None:
    with Client(server.address, metadata=[("warmkv-agent-id", agent)]) as routed:
        routed.prime(agent, token_ids(some_tokens(20, seed)))
        routed.generate(agent, ANY)
        routed.update(v1.Agent(agent_id=agent), "pinned")
        routed.list()
        for call in (
            lambda: routed.prime(f"{agent}-2", ANY),
            lambda: routed.generate(f"{agent}-2", ANY),
            lambda: routed.update(v1.Agent(agent_id=f"{agent}-2"), "pinned"),
        ):
            with refused(*INVALID) as refusals:
                call()
            assert refusals[0].fields == ["agent_id"]


def test_routers_that_disagree(server: Server, agent: str) -> None:
    """Whichever of two names comes first."""
    for names in ((agent, "other"), ("other", agent)):
        metadata = [("warmkv-agent-id", name) for name in names]
        with Client(server.address, metadata=metadata) as routed, refused(*INVALID) as refusals:
            routed.prime(agent, ANY)
        assert refusals[0].fields == ["agent_id"]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets a process's limits be set from outside")
def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (server, client):
        client.prime("before", token_ids(some_tokens(300)))

        def let_files_grow_to(size: int) -> None:
            _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, hard))

        let_files_grow_to(0)
        primed = client.prime("a", token_ids(some_tokens(300, 1)))
        assert not primed.persisted
        answer = client.generate("a", text(" and on"))
        assert (answer.cache.source, answer.cache.cached_tokens) == (v1.CACHE_SOURCE_HOT, 300)
        assert not answer.finished.persisted
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_DURABLE") as refusals:
            client.evict("a")
        assert refusals[0].metadata == {"agent_id": "a"}
        unavailable = (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
        with refused(*unavailable) as refusals:
            client.delete("before")
        assert refusals[0].retry_seconds
        assert client.get("before").token_count == 300
        with refused(*unavailable):
            client.update(v1.Agent(agent_id="before", pinned=True), "pinned")
        with refused(*unavailable) as refusals:
            client.fork("a", "b")
        assert refusals[0].metadata["agent_id"] == "a"
        assert refusals[0].metadata["retry_delay"] == f"{refusals[0].retry_seconds:g}s"
        assert client.stats().counters.commits_failed >= 2

        let_files_grow_to(resource.RLIM_INFINITY)
        assert client.extend("a", text(" again")).persisted
        assert client.evict("a").bytes_freed > 0
        client.delete("before")
        server.kill()
    with serving(tmp_path / "data") as (_, client):
        assert [agent.agent_id for agent in client.list().agents] == ["a"]


def test_the_context_of_another_model(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (_, client):
        client.prime("a", token_ids(some_tokens(300)))
        client.fork("a", "b")
        assert client.get("a").stale_tokens == 0
    with serving(tmp_path / "data", "--kv-bits", "8") as (server, client):
        (said,) = (line for line in server.log_text().splitlines() if "of another fingerprint" in line)
        bytes_there = sum(path.stat().st_size for path in server.files())
        assert f"2 agents with 600 tokens and {bytes_there} bytes" in said
        assert "(kv_bits: 4 -> 8)" in said
        assert "serve with --kv-bits 4" in said
        for agent in client.list().agents:
            assert agent.token_count == agent.stale_tokens == 300
            assert agent.fingerprint_differences == ["kv_bits: 4 -> 8"]
        assert client.stats().gauges.stale_agents == 2
        answer = client.generate("a", text(" and on"))
        assert answer.cache.source == v1.CACHE_SOURCE_COLD
        assert answer.cache.fallback_reason == v1.FALLBACK_REASON_FINGERPRINT
        assert answer.cache.prefilled_tokens == 300 + client.count(text(" and on"), agent_id="a").token_count
        for agent in (client.get("a"), answer.finished.agent):
            assert (agent.stale_tokens, list(agent.fingerprint_differences)) == (0, [])
        assert client.stats().gauges.stale_agents == 1
        client.delete("a")
        assert client.info().kv_bits == 8
    with serving(tmp_path / "data") as (server, client):
        assert client.get("b").stale_tokens == 0
        assert server.log_text().count("of another fingerprint") == 1


def test_a_context_with_tokens_that_this_model_does_not_know(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILIES["llama"].config, build("llama"))
    with serving(tmp_path / "data") as (_, client):
        client.prime("a", token_ids(some_tokens(300)))
    with serving(tmp_path / "data", "--model", str(tmp_path / "model")) as (_, client):
        for call in (client.extend, client.generate):
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED"):
                call("a", token_ids([5]))
        assert client.get("a").revision == 1
        assert client.prime("a", token_ids(range(50))).agent.revision == 2
        assert client.extend("a", token_ids([5])).cache.source == v1.CACHE_SOURCE_HOT
