"""A real server process on a real socket, and short words for what tests say to it."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e import preloaded
from warmkv import v1

WARMKV = Path(sys.executable).with_name("warmkv")
START_SECONDS = 120.0
STOP_SECONDS = 120.0
RPC_SECONDS = 120.0
"""No call of a test takes longer, unless the server hangs."""


class Server:
    """`warmkv serve` on a free port.

    Args:
        data_dir: of the contexts; a second server on the same one sees what the first left.
        arguments: more flags.
        environment: more variables.
    """

    def __init__(
        self, data_dir: Path, *arguments: str, wait: bool = True, environment: Mapping[str, str] | None = None
    ) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_name(f"{data_dir.name}.log")
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        command = ["serve", "--port", "0", "--data-dir", str(data_dir), *arguments]
        with self.log.open("ab") as log:
            self.process = self._start(command, environment or {}, log.fileno())
        threading.Thread(target=self._read, daemon=True).start()
        self.address = self.listening() if wait else ""

    def listening(self) -> str:
        """Wait for the one line that a server prints once it serves, and return the address in it."""
        try:
            line = self._lines.get(timeout=START_SECONDS)
        except queue.Empty:
            pytest.fail(f"the server said nothing for {START_SECONDS} seconds:\n{self.log_text()}")
        if line is None:
            pytest.fail(f"the server ended with {self.process.wait()}:\n{self.log_text()}")
        assert line.startswith("listening on "), line
        return line.removeprefix("listening on ").strip()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(STOP_SECONDS)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def files(self) -> list[Path]:
        """Block files, without the quarantine."""
        return sorted(path for path in self.data_dir.rglob("*.safetensors") if "quarantine" not in path.parts)

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], stderr: int
    ) -> subprocess.Popen[str] | preloaded.Process:
        if sys.platform == "linux" and not environment:  # which could say something to the interpreter
            return preloaded.start(command, clean_environment(), stderr)
        return started_anew([WARMKV, *command], environment, stderr)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def started_anew(command: Sequence[str | Path], environment: Mapping[str, str], stderr: int) -> subprocess.Popen[str]:
    """A process that begins from nothing, as an operator's does."""
    everything = clean_environment() | dict(environment)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=everything)


@contextmanager
def serving(
    data_dir: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Server, Client]]:
    """A server for the block, and a client of it; killed at the end if it still runs. Nothing may break inside it."""
    server = Server(data_dir, *arguments, environment=environment)
    try:
        with Client(server.address) as client:
            yield server, client
    finally:
        if server.process.poll() is None:
            server.kill()
    log = server.log_text()
    assert "internal error" not in log, log
    assert "Traceback" not in log, log


def free_port() -> int:
    """A port that nobody has, and that no connection gets by chance: systems number those from 32768 up."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), k=100):
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port
    pytest.fail("of a hundred ports none is free")


def clean_environment() -> dict[str, str]:
    """The tests' own environment without settings of a server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WARMKV_")}


@dataclass
class Answer:
    """What a Generate sent, taken apart."""

    events: list[v1.GenerateResponse]

    @property
    def started(self) -> v1.GenerateStarted:
        (event,) = (event for event in self.events if event.HasField("started"))
        return event.started

    @property
    def progress(self) -> list[v1.PrefillProgress]:
        return [event.prefill_progress for event in self.events if event.HasField("prefill_progress")]

    @property
    def deltas(self) -> list[v1.GenerateDelta]:
        return [event.delta for event in self.events if event.HasField("delta")]

    @property
    def finished(self) -> v1.GenerateFinished:
        (event,) = (event for event in self.events if event.HasField("finished"))
        assert event is self.events[-1]
        return event.finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def cache(self) -> v1.CacheReport:
        return self.finished.cache


class Client:
    """The generated stubs on one channel."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        # Channels to one address share their connection otherwise, also one to a server that is gone.
        options = [("grpc.use_local_subchannel_pool", 1), *options]
        self.channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        bearer = [("authorization", f"Bearer {token}")] if token is not None else []
        self.metadata: tuple[tuple[str, str | bytes], ...] = (*metadata, *bearer)
        self.agents = v1.AgentServiceStub(self.channel)
        self.server = v1.ServerServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def prime(self, agent_id: str, content: v1.Content | None, **fields: Any) -> v1.PrimeResponse:
        request = v1.PrimeRequest(agent_id=agent_id, content=content, **fields)
        return self.agents.Prime(request, timeout=RPC_SECONDS, metadata=self.metadata)

    def extend(self, agent_id: str, content: v1.Content | None, **fields: Any) -> v1.ExtendResponse:
        request = v1.ExtendRequest(agent_id=agent_id, content=content, **fields)
        return self.agents.Extend(request, timeout=RPC_SECONDS, metadata=self.metadata)

    def stream(self, agent_id: str, content: v1.Content | None = None, **fields: Any) -> Any:
        """The call of a Generate, to be iterated or cancelled."""
        timeout = fields.pop("timeout", RPC_SECONDS)
        request = v1.GenerateRequest(agent_id=agent_id, content=content, **fields)
        return self.agents.Generate(request, timeout=timeout, metadata=self.metadata)

    def generate(self, agent_id: str, content: v1.Content | None = None, **fields: Any) -> Answer:
        fields.setdefault("max_tokens", 8)
        fields.setdefault("ignore_eos", True)
        return Answer(list(self.stream(agent_id, content, **fields)))

    def fork(self, source: str, target: str, request_id: str = "") -> v1.Agent:
        request = v1.ForkAgentRequest(source_agent_id=source, agent_id=target, request_id=request_id)
        return self.agents.ForkAgent(request, timeout=RPC_SECONDS, metadata=self.metadata).agent

    def evict(self, agent_id: str, drop_page_cache: bool = False) -> v1.EvictAgentResponse:
        request = v1.EvictAgentRequest(agent_id=agent_id, drop_page_cache=drop_page_cache)
        return self.agents.EvictAgent(request, timeout=RPC_SECONDS, metadata=self.metadata)

    def get(self, agent_id: str) -> v1.Agent:
        request = v1.GetAgentRequest(agent_id=agent_id)
        return self.agents.GetAgent(request, timeout=RPC_SECONDS, metadata=self.metadata).agent

    def list(self, **fields: Any) -> v1.ListAgentsResponse:
        request = v1.ListAgentsRequest(**fields)
        return self.agents.ListAgents(request, timeout=RPC_SECONDS, metadata=self.metadata)

    def update(self, agent: v1.Agent, *paths: str) -> v1.Agent:
        request = v1.UpdateAgentRequest(agent=agent)
        request.update_mask.paths.extend(paths)
        return self.agents.UpdateAgent(request, timeout=RPC_SECONDS, metadata=self.metadata).agent

    def delete(self, agent_id: str, allow_missing: bool = False) -> None:
        request = v1.DeleteAgentRequest(agent_id=agent_id, allow_missing=allow_missing)
        self.agents.DeleteAgent(request, timeout=RPC_SECONDS, metadata=self.metadata)

    def count(self, content: v1.Content | None, **fields: Any) -> v1.CountTokensResponse:
        request = v1.CountTokensRequest(content=content, include_token_ids=True, **fields)
        return self.server.CountTokens(request, timeout=RPC_SECONDS, metadata=self.metadata)

    def info(self) -> v1.GetServerInfoResponse:
        return self.server.GetServerInfo(v1.GetServerInfoRequest(), timeout=RPC_SECONDS, metadata=self.metadata)

    def stats(self) -> v1.GetServerStatsResponse:
        return self.server.GetServerStats(v1.GetServerStatsRequest(), timeout=RPC_SECONDS, metadata=self.metadata)

    def call(self, path: str, data: bytes, streaming: bool = False) -> Any:
        """Send bytes as they are."""
        channel: Any = self.channel
        make = channel.unary_stream if streaming else channel.unary_unary
        return make(path)(data, timeout=RPC_SECONDS, metadata=self.metadata)

    def health_of(self, service: str = "") -> str:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = self.health.Check(request, timeout=RPC_SECONDS)  # type: ignore[attr-defined]
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def text(value: str) -> v1.Content:
    return v1.Content(text=value)


def token_ids(ids: Iterable[int]) -> v1.Content:
    return v1.Content(token_ids=v1.TokenIds(ids=ids))


def some_tokens(count: int, seed: int = 0) -> list[int]:
    """Ordinary tokens, another sequence for each seed; fewer of them are the beginning of more."""
    return random.Random(seed).choices(range(300, 3000), k=count)


def chat(*messages: tuple[str, str]) -> v1.Content:
    return v1.Content(
        chat=v1.ChatMessages(messages=[v1.ChatMessage(role=role, content=said) for role, said in messages])
    )


@dataclass
class Refusal:
    """An error of the server, with its details."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    fields: list[str]
    retry_seconds: float | None
    metadata: dict[str, str]


@contextmanager
def refused(code: grpc.StatusCode, reason: str) -> Iterator[list[Refusal]]:
    """Expect an RPC in the block to fail so; the list holds the refusal afterwards."""
    found: list[Refusal] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield found
    refusal = refusal_of(caught.value)
    found.append(refusal)
    assert (refusal.code, refusal.reason, refusal.domain) == (code, reason, "warmkv"), refusal


def refusal_of(error: Any) -> Refusal:
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b""))
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        has_retry |= detail.Unpack(retry)
    return Refusal(
        error.code(),
        error.details(),
        info.reason,
        info.domain,
        [violation.field for violation in bad.field_violations],
        retry.retry_delay.ToNanoseconds() / 1e9 if has_retry else None,
        dict(info.metadata),
    )


def check_sums(cache: v1.CacheReport) -> None:
    """What every report of a cache adds up to."""
    assert cache.cached_tokens == cache.hot_tokens + cache.warm_tokens + cache.shared_tokens
    assert cache.cached_tokens + cache.prefilled_tokens == cache.prompt_tokens
    assert (cache.bytes_loaded > 0) >= (cache.warm_tokens > 0)
