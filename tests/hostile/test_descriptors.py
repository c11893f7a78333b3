"""Open files: the operator's limit holds, and strangers' connections leave the store enough of them."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from tests.e2e.commands import assert_one_sentence, run_warmkv
from tests.e2e.harness import Client, free_port, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that
from tests.hostile import http2
from warmkv import v1

pytestmark = pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs /proc")
LIMIT = 300


@contextmanager
def limited(files: int) -> Iterator[None]:
    """What is started in the block may have so many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections_without_a_token_leave_the_store_its_files(tmp_path: Path) -> None:
    tokens, port, probed = tmp_path / "tokens", free_port(), free_port()
    tokens.write_text("red a-token\n")
    flags = ("--token-file", str(tokens), "--metrics-port", str(port), "--health-port", str(probed))

    def metric(name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    with limited(LIMIT):
        started = serving(tmp_path / "data", *flags)
        server, nobody = started.__enter__()
    with ExitStack() as stack:
        stack.push(started)
        client = stack.enter_context(Client(server.address, token="a-token"))
        own = Path(f"/proc/{server.process.pid}/limits").read_text()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        assert next(line.split()[3:5] for line in own.splitlines() if "open files" in line) == [str(LIMIT), str(hard)]

        client.prime("a", token_ids(some_tokens(2000)))
        assert nobody.health_of() == "SERVING"
        most = metric("warmkv_connections_limit")
        with ExitStack() as strangers:
            for _ in range(LIMIT):
                strangers.enter_context(http2.connection(server.address)).send(http2.PREFACE + http2.settings())
            await_that(lambda: metric("warmkv_connections") == most)
            assert metric("warmkv_open_files") < LIMIT - 100
            # Who had a connection goes on, with all that takes files.
            assert nobody.health_of() == "SERVING"
            assert client.prime("b", token_ids(some_tokens(2000, seed=1))).persisted
            client.evict("a")
            assert client.generate("a").cache.source == v1.CACHE_SOURCE_WARM
            with Client(server.address) as late, pytest.raises(grpc.RpcError) as caught:
                late.health_of()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            # So does a probe, at the port that is there for it, and for nothing else.
            with Client(f"127.0.0.1:{probed}", token="a-token") as probe:
                assert probe.health_of() == "SERVING"
                with pytest.raises(grpc.RpcError) as caught:
                    probe.info()
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await_that(lambda: metric("warmkv_connections") < most)
        with Client(server.address) as late:
            assert late.health_of() == "SERVING"


def test_a_low_limit_that_can_not_be_raised() -> None:
    """mlx-lm asks for a higher one when it is imported; only root would get it, and this one can't."""
    powerless: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv")
        powerless = ["setpriv", "--bounding-set=-sys_resource"]
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))\n"
        "import warmkv_server.engine.engine\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([*powerless, sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1000 1000\n"), done.stderr


def test_a_limit_that_leaves_no_room_for_clients(tmp_path: Path) -> None:
    with limited(200):
        assert_one_sentence(run_warmkv("serve", "--port", "0", "--data-dir", tmp_path), "200 open files", "ulimit -n")
