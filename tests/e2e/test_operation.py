"""Starting, health, reflection, metrics, and stopping."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.e2e.commands import assert_one_sentence, run_anew, run_warmkv
from tests.e2e.harness import Answer, Client, Server, free_port, refused, serving, some_tokens, text, token_ids
from tests.e2e.test_adapter import write_adapter
from tests.e2e.waiting import await_that, read_deltas
from warmkv import v1

STORAGE = "warmkv.v1.storage"
SERVICES = ("", "warmkv.v1.AgentService", "warmkv.v1.ServerService")


# Health and reflection


def test_health_says_serving_for_all_and_each(client: Client, server: Server) -> None:
    assert [client.health_of(service) for service in SERVICES] == ["SERVING"] * 3
    assert run_anew("health", "--target", server.address).returncode == 0
    assert run_warmkv("health", "--target", "127.0.0.1:1", "--seconds", "2").returncode == 1


def test_reflection_tells_services_and_messages(client: Client) -> None:
    database = ProtoReflectionDescriptorDatabase(client.channel)
    assert {*SERVICES[1:], "grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("warmkv.v1.AgentService")
    assert "GenerateRequest" in {message.name for message in file.message_type}
    assert database.FindFileContainingSymbol("warmkv.v1.AgentService.Generate").name == file.name


def test_reflection_v1_tells_the_same(client: Client) -> None:
    ask = client.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert set(SERVICES[1:]) <= {service.name for service in answer.list_services_response.service}


def test_info_tells_what_is_served(client: Client) -> None:
    info = client.info()
    assert (info.model_id, info.model_kind) == ("builtin:tiny", v1.MODEL_KIND_BUILTIN)
    assert (info.context_limit, info.kv_bits, info.kv_group_size) == (32768, 4, 64)
    assert info.weights_digest
    assert info.fingerprint
    assert info.device
    assert len(info.layers) >= 2
    assert {layer.cache_kind for layer in info.layers} == {v1.CACHE_KIND_APPEND_ONLY}
    assert {(layer.key_dim, layer.value_dim) for layer in info.layers} == {(64, 64)}
    assert info.kv_bytes_per_token > 0
    assert info.hot_bytes_limit > 0
    assert info.durability == v1.DURABILITY_FULL
    assert {"warmkv", "mlx", "mlx-lm", "grpcio", "protobuf", "python", "block-format"} <= set(info.versions)
    assert info.default_max_tokens == 256


# Starting


def test_a_port_that_is_taken(server: Server, tmp_path: Path) -> None:
    port = server.address.rpartition(":")[2]
    result = run_warmkv("serve", "--port", port, "--data-dir", tmp_path)
    assert_one_sentence(result, port, "Address already in use", "--port")


@pytest.mark.parametrize("model", ["/no/such/folder", "builtin:huge", "random:triangle", "{tmp}"])
def test_a_model_that_is_not_there(tmp_path: Path, model: str) -> None:
    result = run_warmkv("serve", "--port", "0", "--data-dir", tmp_path / "data", "--model", model.format(tmp=tmp_path))
    assert_one_sentence(result)


def test_a_data_folder_that_another_server_has(server: Server) -> None:
    result = run_warmkv("serve", "--port", "0", "--data-dir", server.data_dir)
    assert_one_sentence(result, str(server.data_dir))


def slow_adapter(folder: Path) -> Callable[[], object]:
    """Make an adapter whose configuration comes out of a pipe, and the function that puts it in: a server that loads
    it is loading until then."""
    config = write_adapter(folder, seed=1) / "adapter_config.json"
    content = config.read_text()
    config.unlink()
    os.mkfifo(config)

    def let_it_load() -> None:
        whole = config.with_name("whole.json")
        whole.write_text(content)
        with config.open("w") as pipe:
            whole.replace(config)  # for whoever reads it again
            pipe.write(content)

    return let_it_load


def test_while_the_model_loads(tmp_path: Path) -> None:
    let_it_load = slow_adapter(tmp_path / "adapter")
    address = f"127.0.0.1:{free_port()}"
    # The last --port counts.
    flags = ["--port", address.rpartition(":")[2], "--adapter", str(tmp_path / "adapter")]
    server = Server(tmp_path / "data", *flags, wait=False)
    try:
        reconnect = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 20)]
        with Client(address, options=reconnect) as client:
            grpc.channel_ready_future(client.channel).result(timeout=120)
            assert [client.health_of(service) for service in SERVICES] == ["NOT_SERVING"] * 3
            with refused(grpc.StatusCode.UNAVAILABLE, "LOADING") as refusals:
                client.list()
            assert refusals[0].retry_seconds == 1.0
            let_it_load()
            assert server.listening() == address
            assert client.health_of() == "SERVING"
            assert client.info().model_kind == v1.MODEL_KIND_BUILTIN
    finally:
        server.kill()


def test_sigterm_while_the_model_loads(tmp_path: Path) -> None:
    slow_adapter(tmp_path / "adapter")
    server = Server(tmp_path / "data", "--adapter", str(tmp_path / "adapter"), wait=False)
    await_that(lambda: "loading" in server.log_text())
    assert server.terminate() == 0
    assert "stopped while loading" in server.log_text()


# The disk


def test_health_tells_when_the_disk_refuses_and_when_it_takes_again(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--disk-bytes", "1700kB") as (server, client):
        assert client.health_of(STORAGE) == "SERVING"
        refused_by_quota = client.prime("a", token_ids(some_tokens(3000)))
        assert not refused_by_quota.persisted
        assert client.health_of(STORAGE) == "NOT_SERVING"
        assert client.health_of() == "SERVING"
        answer = client.generate("a", text(" x"), ephemeral=True)
        assert answer.cache.hot_tokens == 3000
        client.delete("a")
        assert client.health_of(STORAGE) == "SERVING"
        assert "the disk refuses commits" in server.log_text()
        assert "the disk takes commits again" in server.log_text()


# Stopping


def test_sigterm_lets_streams_end_and_commits_them(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (server, client):
        longest = client.stream("b", token_ids(some_tokens(50, 1)), max_tokens=20_000, ignore_eos=True)
        read_deltas(longest, 1)
        stream = client.stream("a", token_ids(some_tokens(50)), max_tokens=150, ignore_eos=True)
        head = read_deltas(stream, 3)
        server.signal(signal.SIGTERM)
        await_that(lambda: client.health_of() != "SERVING")
        assert client.health_of("warmkv.v1.AgentService") == "NOT_SERVING"
        with refused(grpc.StatusCode.UNAVAILABLE, "DRAINING") as refusals:
            client.list()
        assert refusals[0].retry_seconds
        rest = Answer(list(stream))
        assert len(head) + len(rest.tokens) == 150
        assert rest.finished.persisted
        longest.cancel()  # until now there was something to wait for
        assert server.wait() == 0
    with serving(tmp_path / "data") as (_, client):
        assert (client.get("a").token_count, client.get("a").revision) == (200, 1)


@pytest.mark.parametrize("how", ["deadline", "second signal"])
def test_draining_ends_and_what_was_sampled_is_committed_and_sent(tmp_path: Path, how: str) -> None:
    seconds = "0.5" if how == "deadline" else "600"
    # The connection takes so little that a part of the answer is still in the server when its client reads on.
    little = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with (
        serving(tmp_path / "data", "--drain-seconds", seconds) as (server, client),
        Client(server.address, options=little) as slow,
    ):
        client.prime("a", token_ids(some_tokens(50)))
        stream = slow.stream("a", token_ids([301]), max_tokens=20_000, ignore_eos=True)
        head = read_deltas(stream, 3)
        await_that(lambda: client.get("a").tokens_done > 300)
        server.signal(signal.SIGINT)
        if how == "second signal":
            await_that(lambda: client.health_of() != "SERVING")
            server.signal(signal.SIGTERM)
        with refused(grpc.StatusCode.UNAVAILABLE, "DRAINING"):
            for event in stream:
                head += event.delta.token_ids
        assert server.wait() == 0
    with serving(tmp_path / "data") as (_, client):
        assert (client.get("a").token_count, client.get("a").revision) == (51 + len(head), 2)


def test_routers_are_given_notice_of_a_stop(tmp_path: Path) -> None:
    """A router that asks for health sees that the server stops before the server refuses a call."""
    with serving(tmp_path / "data", "--drain-notice-seconds", "600") as (server, client):
        server.signal(signal.SIGTERM)
        await_that(lambda: client.health_of() == "NOT_SERVING")
        assert client.generate("a", token_ids(some_tokens(20))).finished.persisted
        server.signal(signal.SIGTERM)  # which ends the notice
        assert server.wait() == 0


def test_an_idle_server_stops_at_once_even_if_its_health_is_watched(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--drain-seconds", "600") as (server, client):
        seen: list[Any] = []
        watch = client.health.Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
        seen.append(next(watch).status)
        threading.Thread(target=lambda: seen.extend(_until_gone(watch)), daemon=True).start()
        assert server.terminate() == 0
        assert seen[0] == 1


def _until_gone(watch: Any) -> list[int]:
    statuses: list[int] = []
    with contextlib.suppress(grpc.RpcError):
        statuses.extend(answer.status for answer in watch)
    return statuses


# Looking in


def test_metrics(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path / "data", "--metrics-port", str(port)) as (_, client):
        client.prime("a", token_ids(some_tokens(300)))
        answer = client.generate("a", text(" x"))
        with pytest.raises(grpc.RpcError):
            client.get("nobody")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            lines = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
        assert float(lines['warmkv_rpcs_total{code="OK",method="Prime"}']) == 1
        assert float(lines['warmkv_rpcs_total{code="NOT_FOUND",method="GetAgent"}']) == 1
        assert float(lines['warmkv_first_token_seconds_count{source="hot"}']) == 1
        assert float(lines["warmkv_hot_tokens_reused_total"]) == 300
        assert float(lines["warmkv_prefilled_tokens_total"]) == 300 + answer.cache.prefilled_tokens
        assert float(lines['warmkv_agents{tier="hot"}']) == 1
        assert float(lines["warmkv_hot_bytes"]) == client.stats().gauges.hot_bytes


def test_the_log_has_no_prompt_text(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--log-level", "debug") as (server, client):
        client.generate("a", text("the secret word is xylophone"))
        with pytest.raises(grpc.RpcError):
            client.prime("not an id", text("another xylophone"))
        assert server.terminate() == 0
        assert "xylophone" not in server.log_text()


def test_doctor_and_version() -> None:
    found = run_warmkv("doctor")
    assert found.returncode == 0
    assert "GFLOP/s" in found.stdout
    assert "mlx-lm" in found.stdout
    assert re.search(r"^memory +[\d.]+ GiB, ", found.stdout, re.MULTILINE)
    assert run_anew("version").stdout.strip()
