"""A data directory whose files can't be changed any more, under a live server: refusals, and no death."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import refused, serving, some_tokens, token_ids


@contextmanager
def immutable(folder: Path) -> Iterator[None]:
    done = subprocess.run(["chattr", "-R", "+i", folder], capture_output=True, text=True)
    try:
        if done.returncode:
            pytest.skip(f"files can't be made immutable here: {done.stderr[:100]}")
        yield
    finally:
        subprocess.run(["chattr", "-R", "-i", folder], check=False, capture_output=True)


def test_immutable_files_don_t_kill_the_server(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with serving(data_dir) as (server, client):
        client.prime("a", token_ids(some_tokens(300)))
        client.prime("b", token_ids(some_tokens(300, seed=1)))
        agent = client.get("a")
        for round_number in range(2):
            with immutable(data_dir):
                agent.labels["k"] = str(round_number)
                with refused(grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE"):
                    client.update(agent, "labels")
                with refused(grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE"):
                    client.delete("b")
                assert not client.extend("a", token_ids(some_tokens(20, seed=round_number))).persisted
                assert server.process.poll() is None
            client.update(agent, "labels")
            assert client.extend("a", token_ids(some_tokens(20, seed=round_number + 5))).persisted
        assert not list(data_dir.glob("*-shm"))
        expected = client.get("a")
        server.kill()
    with serving(data_dir) as (_, client):
        found = client.get("a")
        assert (found.token_count, found.revision, dict(found.labels)) == (
            expected.token_count,
            expected.revision,
            dict(expected.labels),
        )
