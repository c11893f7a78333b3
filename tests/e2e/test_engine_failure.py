"""The engine breaks in a real server: what is in flight ends with an id, health says so, and it goes on, once."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.e2e.harness import Client, Refusal, Server, refusal_of, some_tokens, started_anew, token_ids
from tests.e2e.waiting import read_deltas

POISON = 2999
"""A prompt that ends with this token breaks whatever is planted."""

PLANT = f"""
import sys
from warmkv_server.engine.steps.schedule import Schedule
from warmkv_server.main import main

pick = Schedule.pick

def broken(self, *args):
    if any(sequence.job.tokens[-1] == {POISON} for sequence in self.prefilling):
        raise ZeroDivisionError("planted")
    return pick(self, *args)

Schedule.pick = broken
sys.exit(main())
"""


class Planted(Server):
    """The server's own command line, in a process where `Schedule.pick` breaks on a prompt."""

    def _start(self, command: Sequence[str], environment: Mapping[str, str], stderr: int) -> subprocess.Popen[str]:
        return started_anew([sys.executable, "-c", PLANT, *command], environment, stderr)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Planted]:
    server = Planted(tmp_path / "data")
    yield server
    if server.process.poll() is None:
        server.kill()


def failure(call: Callable[[], Any]) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_ERROR"), refusal
    assert refusal.metadata["error_id"] in refusal.message
    return refusal


def test_it_fails_begins_anew_and_fails_for_good(server: Planted) -> None:
    with Client(server.address) as client, Client(server.address) as watcher:
        client.prime("kept", token_ids(some_tokens(300)))
        watched: Any = watcher.health.Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]

        def said() -> str:
            return health_pb2.HealthCheckResponse.ServingStatus.Name(next(watched).status)

        said_so_far = [said()]

        def break_it() -> None:
            stream = client.stream("", token_ids(some_tokens(20)), max_tokens=20_000, ignore_eos=True)
            read_deltas(stream, 1)
            first = failure(lambda: client.generate("", token_ids([*some_tokens(20), POISON])))
            second = failure(lambda: list(stream))
            assert first.message == second.message
            assert first.message.split()[2].rstrip(";") in server.log_text()

        break_it()
        assert client.generate("kept", token_ids([5])).cache.cached_tokens >= 300
        assert client.health_of() == "SERVING"
        break_it()
        with contextlib.suppress(grpc.RpcError):  # the stream ends with the process
            while True:
                said_so_far.append(said())
        # A watcher is told what is so when it looks: beginning anew may be over before it does.
        assert said_so_far in (["SERVING", "NOT_SERVING"], ["SERVING", "NOT_SERVING"] * 2)
    assert server.wait() == 1
    last = server.log_text().splitlines()[-1]
    assert last.startswith("warmkv: the engine has failed twice within 60 seconds"), last
