"""Who may call, what they may name, and over what."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from tests.e2e.commands import assert_one_sentence, run_warmkv
from tests.e2e.harness import Client, Server, refusal_of, refused, serving, some_tokens, text, token_ids
from warmkv import v1

TLS = Path(__file__).parent / "tls"


def test_tokens_and_tenants(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("# tenant token prefix\nred red-token\nred narrow-token team1-\n\nblue blue-token # both\n")
    content = token_ids(some_tokens(300))
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    with serving(tmp_path / "data", "--token-file", str(tokens)) as (server, nobody):
        assert nobody.health_of() == "SERVING"
        for call in (nobody.list, nobody.info, lambda: nobody.generate("a", content)):
            with refused(unauthenticated, "TOKEN_MISSING"):
                call()
        for header in ("Bearer wrong", "Bearer ", "Basic red-token", "red-token"):
            stranger = Client(server.address, metadata=[("authorization", header)])
            with stranger, refused(unauthenticated, "TOKEN_INVALID"):
                stranger.list()
        with refused(unauthenticated, "TOKEN_MISSING"):  # what it sent is nobody's business
            nobody.call("/warmkv.v1.AgentService/Prime", b"\xff")

        with (
            Client(server.address, token="red-token") as red,
            Client(server.address, token="blue-token") as blue,
            Client(server.address, token="narrow-token") as narrow,
        ):
            red.prime("team1-a", content)
            red.prime("other", content, request_id="same id")
            with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
                blue.get("team1-a")
            with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
                blue.delete("team1-a")
            assert not blue.list().agents
            # Nothing is shared between tenants: neither blocks, nor names, nor request ids.
            other = blue.prime("team1-a", content, request_id="same id")
            assert (other.cache.source, other.agent.revision) == (v1.CACHE_SOURCE_COLD, 1)
            assert other.agent.shared_bytes == 0
            assert red.prime("third", content).cache.source == v1.CACHE_SOURCE_SHARED

            assert [agent.agent_id for agent in narrow.list().agents] == ["team1-a"]
            assert narrow.generate("team1-a", text(" x")).finished.agent.revision == 2
            forbidden = (grpc.StatusCode.PERMISSION_DENIED, "AGENT_FORBIDDEN")
            for forbid in (
                lambda: narrow.get("other"),
                lambda: narrow.fork("other", "team1-b"),
                lambda: narrow.fork("team1-a", "b"),
                lambda: narrow.delete("nobody"),
                lambda: narrow.generate("other", text("x")),
                lambda: narrow.update(v1.Agent(agent_id="other"), "pinned"),
            ):
                with refused(*forbidden) as refusals:
                    forbid()
                assert refusals[0].metadata["agent_prefix"] == "team1-"
                assert not refusals[0].metadata["agent_id"].startswith("team1-")
        server.kill()
        assert "red-token" not in server.log_text()


def test_tls(tmp_path: Path) -> None:
    certificate, key = str(TLS / "certificate.pem"), str(TLS / "key.pem")
    flags = ["--tls-cert", certificate, "--tls-key", key]
    server = Server(tmp_path / "data", *flags)
    try:
        credentials = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
        with Client(server.address, credentials=credentials) as client:
            assert client.generate("a", text("Hello")).finished.persisted
        with Client(server.address) as plain, pytest.raises(grpc.RpcError) as caught:
            plain.info()
        assert refusal_of(caught.value).code is grpc.StatusCode.UNAVAILABLE
        stranger = Client(server.address, credentials=grpc.ssl_channel_credentials())
        with stranger, pytest.raises(grpc.RpcError):
            stranger.info()
    finally:
        server.kill()


def test_other_addresses_with_tokens_or_tls_or_the_word(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--host", "0.0.0.0", "--insecure-bind") as (server, _):
        port = server.address.rpartition(":")[2]
        with Client(f"127.0.0.1:{port}") as client:
            assert client.health_of() == "SERVING"


def test_each_tenant_is_told_of_its_own(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("red red-token\nblue blue-token\n")
    with serving(tmp_path / "data", "--token-file", str(tokens)) as (server, _):
        red, blue = (Client(server.address, token=f"{tenant}-token") for tenant in ("red", "blue"))
        with red, blue:
            red.prime("a", token_ids(some_tokens(300)))
            red.prime("b", token_ids(some_tokens(300)))
            blue.prime("a", token_ids(some_tokens(40)))
            reds, blues = red.stats(), blue.stats()
            assert (reds.counters.prefilled_tokens, reds.counters.shared_tokens_reused) == (300, 300)
            assert (blues.counters.prefilled_tokens, blues.counters.shared_tokens_reused) == (40, 0)
            assert dict(blues.counters.requests_by_source) == {"CACHE_SOURCE_COLD": 1}
            assert (sum(reds.gauges.agents_by_tier.values()), sum(blues.gauges.agents_by_tier.values())) == (2, 1)
            for stats in (reds, blues):
                assert (stats.gauges.hot_bytes, stats.gauges.disk_bytes, stats.counters.kv_bytes_written) == (0, 0, 0)


def test_one_tenant_alone_is_told_everything(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("red red-token\nred other-token\n")
    with serving(tmp_path / "data", "--token-file", str(tokens)) as (server, _):
        red = Client(server.address, token="red-token")
        with red:
            red.prime("a", token_ids(some_tokens(300)))
            assert red.stats().gauges.hot_bytes > 0
            assert red.stats().counters.kv_bytes_written > 0


def test_one_token_for_two_tenants(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    for second in ("blue", "red team-"):
        tenant, _, prefix = second.partition(" ")
        tokens.write_text(f"red secret\n\n{tenant} secret {prefix}\n")
        result = run_warmkv("serve", "--port", "0", "--data-dir", tmp_path / "data", "--token-file", tokens)
        assert_one_sentence(result, "line 3", "token of an earlier line")
        assert "secret" not in result.stderr.replace("secrets", "")


def test_two_tokens_in_one_call(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("red red-token\nblue blue-token\n")
    with serving(tmp_path / "data", "--token-file", str(tokens)) as (server, _):
        both = [("authorization", "Bearer red-token"), ("authorization", "Bearer blue-token")]
        client = Client(server.address, metadata=both)
        with client, refused(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
            client.list()


def test_what_an_operator_left_open_is_said_once(tmp_path: Path) -> None:
    tokens, key = tmp_path / "tokens", tmp_path / "key.pem"
    tokens.write_text("red red-token\n")
    key.write_bytes((TLS / "key.pem").read_bytes())
    safe = ["--tls-cert", str(TLS / "certificate.pem"), "--tls-key", str(key), "--token-file", str(tokens)]
    clear = ["--host", "0.0.0.0", "--token-file", str(tokens)]

    def warnings(folder: str, flags: list[str]) -> list[str]:
        server = Server(tmp_path / folder, *flags)
        server.kill()
        return [
            line
            for line in server.log_text().splitlines()
            if " WARNING warmkv_server.service" in line or "--host" in line
        ]

    for path in (tokens, key):
        path.chmod(0o600)
    assert warnings("safe", safe) == []
    (in_clear,) = warnings("clear", clear)
    assert "--tls-cert" in in_clear
    for path in (tokens, key):
        path.chmod(0o644)
    of_tokens, of_key = warnings("open", safe)
    assert str(tokens) in of_tokens
    assert str(key) in of_key
