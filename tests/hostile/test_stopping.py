"""Stopping while the disk refuses, and while it doesn't answer at all."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import Client, Server, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that
from warmkv import v1

_LARGEST_FILE = 64 << 10
"""Bytes; less than what is committed here takes, and more than the log."""
_DEAD_DISK = """
import os, threading
real = os.fsync
def fsync(fd):
    if os.path.exists(os.environ["DEAD"]):
        threading.Event().wait()
    real(fd)
os.fsync = fsync
if hasattr(os, "posix_fadvise"):
    real_advise = os.posix_fadvise
    def posix_fadvise(*arguments):
        if os.path.exists(os.environ["DEAD"] + ".to-look-at"):
            open(os.environ["DEAD"] + ".asked", "w").close()
            threading.Event().wait()
        real_advise(*arguments)
    os.posix_fadvise = posix_fadvise
"""


def let_disk_refuse(server: Server, refuse: bool) -> None:
    """Have the system refuse what makes a file larger than a limit."""
    limit = _LARGEST_FILE if refuse else resource.RLIM_INFINITY
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def prime_in_ram(client: Client, agent: str, seed: int = 0) -> None:
    assert not client.prime(agent, token_ids(some_tokens(300, seed))).persisted


def test_what_would_be_lost_is_named_and_a_second_signal_stops_without_it(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--drain-seconds", "600") as (server, client):
        client.prime("kept", token_ids(some_tokens(300)))
        let_disk_refuse(server, True)
        for number in range(22):
            prime_in_ram(client, f"lost-{number:02}", number)
        server.signal(signal.SIGTERM)
        await_that(lambda: "they would be lost" in server.log_text())
        assert "22 agents ('lost-00', 'lost-01', " in server.log_text()
        assert "'lost-19', 2 more)" in server.log_text()
        assert "lost-20'," not in server.log_text().partition("they would be lost")[0].rpartition("refuses")[2]
        server.signal(signal.SIGTERM)
        assert server.wait() == 3
        assert "stopped although the disk refuses the last commits of 22 agents" in server.log_text()
    with serving(tmp_path / "data") as (_, client):
        assert [agent.agent_id for agent in client.list().agents] == ["kept"]


def test_a_stop_waits_no_longer_for_the_disk_than_for_requests(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--drain-seconds", "1") as (server, client):
        client.prime("a", token_ids(some_tokens(20)))
        let_disk_refuse(server, True)
        prime_in_ram(client, "a")
        assert server.terminate() == 3
        assert "1 agent ('a')" in server.log_text()
    with serving(tmp_path / "data") as (_, client):
        assert client.get("a").token_count == 20


def test_what_the_disk_takes_before_the_end_is_not_lost(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--drain-seconds", "600") as (server, client):
        let_disk_refuse(server, True)
        prime_in_ram(client, "a")
        server.signal(signal.SIGTERM)
        await_that(lambda: "they would be lost" in server.log_text())
        let_disk_refuse(server, False)
        assert server.wait() == 0
        assert "the disk has taken them" in server.log_text()
    with serving(tmp_path / "data") as (_, client):
        assert client.get("a").token_count == 300


@pytest.fixture
def dying(tmp_path: Path) -> dict[str, str]:
    """An environment in which no sync of a file returns any more once `tmp_path / "dead"` is there, and no dropping of
    its pages once `dead.to-look-at` is."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(_DEAD_DISK)
    return {"PYTHONPATH": str(tmp_path / "python"), "DEAD": str(tmp_path / "dead")}


def test_a_commit_on_a_dead_disk_does_not_hold_up_the_end(tmp_path: Path, dying: dict[str, str]) -> None:
    with serving(tmp_path / "data", "--drain-seconds", "1", environment=dying) as (server, client):
        client.prime("kept", token_ids(some_tokens(300)))
        (tmp_path / "dead").touch()
        failed = threading.Thread(target=_fail_to_prime, args=(client,))
        failed.start()
        await_that(lambda: any((server.data_dir / "blocks").rglob("*.tmp")))
        assert server.terminate() == 1
        failed.join()
        assert "the disk has not answered" in server.log_text()
        assert "1 agent ('stuck')" in server.log_text()
    with serving(tmp_path / "data") as (_, client):
        assert [agent.agent_id for agent in client.list().agents] == ["kept"]


def _fail_to_prime(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        client.prime("stuck", token_ids(some_tokens(300, 1)))


def test_a_manifest_on_a_dead_disk_does_not_hold_up_the_end(tmp_path: Path, dying: dict[str, str]) -> None:
    """The index has everything: it is the manifest that nobody waited for."""
    with serving(tmp_path / "data", "--drain-seconds", "1", environment=dying) as (server, client):
        client.prime("a", token_ids(some_tokens(300)))
        (tmp_path / "dead").touch()
        client.update(v1.Agent(agent_id="a", pinned=True), "pinned")
        assert server.terminate() == 1
        assert "all that was committed is on it" in server.log_text()
    with serving(tmp_path / "data") as (_, client):
        assert client.get("a").pinned


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing reaches the disk for this")
def test_a_look_at_a_dead_disk_does_not_hold_up_the_end(tmp_path: Path, dying: dict[str, str]) -> None:
    """Its request is cut short, and nobody waits for the thread that is left in the system."""
    with serving(tmp_path / "data", "--drain-seconds", "1", environment=dying) as (server, client):
        client.prime("a", token_ids(some_tokens(300)))
        (tmp_path / "dead.to-look-at").touch()

        def fail_to_evict() -> None:
            with pytest.raises(grpc.RpcError):
                client.evict("a", drop_page_cache=True)

        failed = threading.Thread(target=fail_to_evict)
        failed.start()
        await_that((tmp_path / "dead.asked").exists)
        assert server.terminate() == 1
        failed.join()
        assert "all that was committed is on it" in server.log_text()
    with serving(tmp_path / "data") as (_, client):
        assert client.get("a").token_count == 300
