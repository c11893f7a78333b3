"""What Envoy does with the configuration that `warmkv fleet envoy` writes, before real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.harness import Client, Server, refused, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that
from tests.fleet.envoy import Envoy, envoy
from warmkv import v1
from warmkv.client import Client as Library

AGENTS = [f"agent-{number}" for number in range(24)]


@dataclass
class Fleet:
    servers: dict[str, Server]
    envoy: Envoy
    router: Client
    direct: dict[str, Client]

    @property
    def addresses(self) -> dict[str, str]:
        return {name: server.address for name, server in self.servers.items()}

    def places(self) -> dict[str, str]:
        """The server that each agent is on."""
        return {
            agent.agent_id: name for name, client in self.direct.items() for agent in client.list(page_size=1000).agents
        }


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        found = {name: stack.enter_context(serving(folder / name)) for name in ("red", "green", "blue")}
        servers = {name: server for name, (server, _) in found.items()}
        router = stack.enter_context(
            envoy(folder / "envoy", {name: server.address for name, server in servers.items()})
        )
        client = stack.enter_context(Client(router.address))
        yield Fleet(servers, router, client, {name: client for name, (_, client) in found.items()})


def test_what_calls_are_passes_through(fleet: Fleet) -> None:
    """Streams, errors with their details, a client's metadata, large requests, health and reflection's service."""
    router = fleet.router
    answer = router.generate("through", token_ids(some_tokens(30)), max_tokens=20)
    assert len(answer.deltas) == 20
    assert answer.finished.persisted
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        router.get("nobody")
    large = v1.Content(text="a " * (6 << 20))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_TOO_LONG"):
        router.prime("large", large)
    assert router.health_of() == "SERVING"


def test_a_cancelled_call_stops_at_the_server(fleet: Fleet) -> None:
    stream = fleet.router.stream("cancelled", token_ids(some_tokens(30)), max_tokens=20_000, ignore_eos=True)
    for event in stream:
        if event.HasField("delta"):
            break
    stream.cancel()
    await_that(lambda: "cancelled" in fleet.places())
    assert fleet.router.get("cancelled").activity == v1.ACTIVITY_IDLE
    assert 30 < fleet.router.get("cancelled").token_count < 5_000


def test_a_deadline_is_a_deadline(fleet: Fleet) -> None:
    for number in range(20):
        content = token_ids(some_tokens(30, seed=number))
        with pytest.raises(grpc.RpcError) as caught:
            list(fleet.router.stream("", content, max_tokens=20_000, ignore_eos=True, timeout=0.3))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED, caught.value


def test_agents_are_led_by_their_name_wherever_it_stands(fleet: Fleet) -> None:
    """In metadata, as the client library says it, or in the request alone, as grpcurl sends it."""
    for agent in AGENTS:
        fleet.router.prime(agent, token_ids(some_tokens(10)))
    places = fleet.places()
    assert {places[agent] for agent in AGENTS} == set(fleet.servers)
    with Library(fleet.envoy.address) as client:
        for agent in AGENTS:
            assert client.get(agent).revision == 1
            client.extend(agent, token_ids([301]))
    for agent in AGENTS:
        assert fleet.router.update(v1.Agent(agent_id=agent, pinned=True), "pinned").revision == 2
        fleet.router.generate(agent, token_ids([302]))
    assert {agent: fleet.places()[agent] for agent in AGENTS} == {agent: places[agent] for agent in AGENTS}


def test_json_and_grpc_web_are_taken(fleet: Fleet) -> None:
    fleet.router.prime("json", token_ids(some_tokens(10)))
    assert post(fleet, "AgentService/GetAgent", {"agent_id": "json"})["agent"]["token_count"] == 10
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(fleet, "AgentService/GetAgent", {"agent_id": "nobody"})
    assert caught.value.code == 404
    said = json.loads(caught.value.read())
    assert said["details"][0]["reason"] == "AGENT_NOT_FOUND"
    events = post(fleet, "AgentService/Generate", {"agent_id": "json", "content": {"text": " and"}, "max_tokens": 3})
    assert events[-1]["finished"]["agent"]["revision"] == "2"

    message = v1.GetAgentRequest(agent_id="json").SerializeToString()
    request = urllib.request.Request(
        f"http://{fleet.envoy.address}/warmkv.v1.AgentService/GetAgent",
        b"\0" + len(message).to_bytes(4, "big") + message,
        {"content-type": "application/grpc-web+proto"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        framed = response.read()
    size = int.from_bytes(framed[1:5], "big")
    assert v1.GetAgentResponse.FromString(framed[5 : 5 + size]).agent.revision == 2


def test_a_server_that_leaves_the_list_takes_nobody_elses_agents_along(fleet: Fleet) -> None:
    """Even while it is well; and one that comes back under its name has its agents again, wherever it is now."""
    for agent in AGENTS:
        fleet.router.prime(agent, token_ids(some_tokens(10)))
    places = fleet.places()
    left = {name: address for name, address in fleet.addresses.items() if name != "red"}
    fleet.envoy.lead_to(left)
    fleet.envoy.await_healthy(left)
    for agent in AGENTS:
        if places[agent] == "red":
            with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
                fleet.router.get(agent)
        else:
            assert fleet.router.get(agent).agent_id == agent
    # The same server under another address: what counts is the name.
    with relay(fleet.addresses["red"]) as elsewhere:
        fleet.envoy.lead_to({**left, "red": elsewhere})
        fleet.envoy.await_healthy({**left, "red": elsewhere})
        await_that(lambda: all(_has(fleet.router, agent) for agent in AGENTS))  # each worker of Envoy's hears of it
    fleet.envoy.lead_to(fleet.addresses)
    fleet.envoy.await_healthy(fleet.addresses)


def test_a_server_that_drains_is_given_no_agents(fleet: Fleet) -> None:
    rest = {name: address for name, address in fleet.addresses.items() if name != "green"}
    fleet.envoy.lead_to(fleet.addresses, draining=["green"])
    fleet.envoy.await_healthy(rest)
    new = [f"new-{number}" for number in range(24)]
    for agent in new:
        fleet.router.prime(agent, token_ids(some_tokens(5)))
    assert {fleet.places()[agent] for agent in new} == {*rest}
    fleet.envoy.lead_to(fleet.addresses)
    fleet.envoy.await_healthy(fleet.addresses)


def test_a_stop_with_notice_costs_no_call(tmp_path: Path) -> None:
    """SIGTERM while calls come all the time: those that the stopping server has, it ends, and others go elsewhere."""
    with ExitStack() as stack:
        found = [
            stack.enter_context(serving(tmp_path / name, "--drain-notice-seconds", "4")) for name in ("one", "two")
        ]
        addresses = {name: server.address for name, (server, _) in zip(("one", "two"), found, strict=True)}
        router = stack.enter_context(envoy(tmp_path / "envoy", addresses))
        done, errors, stop = [0], list[grpc.RpcError](), threading.Event()

        def ask(number: int) -> None:
            with Client(router.address) as client:
                while not stop.is_set():
                    try:
                        client.generate("", token_ids(some_tokens(20, seed=number)), max_tokens=10)
                        done[0] += 1
                    except grpc.RpcError as error:
                        errors.append(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        await_that(lambda: done[0] > 8)
        assert found[0][0].terminate() == 0
        before = done[0]
        await_that(lambda: done[0] > before + 8)
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors, errors


def post(fleet: Fleet, method: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://{fleet.envoy.address}/warmkv.v1.{method}",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


@contextlib.contextmanager
def relay(address: str) -> Iterator[str]:
    """Another address of a server."""
    host, port = address.rsplit(":", 1)
    loop, stop, listening = asyncio.new_event_loop(), asyncio.Event(), Future[int]()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async def run() -> None:
        async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as server:
            listening.set_result(server.sockets[0].getsockname()[1])
            await stop.wait()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        thread = threading.Thread(target=runner.run, args=(run(),))
        thread.start()
        try:
            yield f"127.0.0.1:{listening.result()}"
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()


def _has(client: Client, agent: str) -> bool:
    try:
        return client.get(agent).agent_id == agent
    except grpc.RpcError:
        return False
