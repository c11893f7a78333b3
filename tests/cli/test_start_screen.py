"""What `warmkv serve` says when it serves, on a terminal and in its log, and where it keeps contexts."""

from __future__ import annotations

import io
import logging
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from tests.cli.terminal import terminal
from tests.e2e.harness import WARMKV, clean_environment, free_port, serving, text
from tests.e2e.test_access import TLS
from warmkv_server.cli.bar import Bar
from warmkv_server.cli.start_screen import StartScreen
from warmkv_server.offline.directory import make


def test_on_a_terminal_one_screen_and_last_the_line_that_programs_wait_for(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("ours secret-1\n")
    port, metrics = free_port(), free_port()
    flags = ["--tls-cert", str(TLS / "certificate.pem"), "--tls-key", str(TLS / "key.pem")]
    flags += ["--token-file", str(tmp_path / "tokens"), "--disk-bytes", "1GiB", "--hot-bytes", "100MiB"]
    flags += ["--port", str(port), "--metrics-port", str(metrics), "--data-dir", str(tmp_path / "data")]
    with terminal("serve", *flags, columns=400) as server:  # so that no path is folded
        server.expect(f"listening on 127.0.0.1:{port}\r\n")
        lines = [line.strip("│ \r") for line in server.seen.splitlines()]
        rows = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in lines if line}
        assert rows["model"] == "builtin:tiny, contexts of up to 32,768 tokens"
        assert rows["KV"] == "affine4 in groups of 64, 576 bytes a token"
        assert rows["RAM"] == "100.0 MiB for contexts at rest: 44 of 4K or 5 of 32K tokens hot"
        assert rows["disk"] == "1.0 GiB at most: 455 of 4K or 56 of 32K tokens warm"
        assert rows["data"].endswith(", 0 agents")
        assert rows["access"] == "this machine's programs, with a token of the token file, over TLS"
        assert rows["metrics"] == f"http://127.0.0.1:{metrics}/metrics"
        assert rows["next"].startswith(f"WARMKV_TOKEN=… warmkv chat --target 127.0.0.1:{port} --tls-ca")
        assert lines[-1] == f"listening on 127.0.0.1:{port}"


def test_in_the_log_it_is_lines_and_stdout_has_the_one(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (server, client):
        client.prime("a", text("Some text"))
        assert f"data: {(tmp_path / 'data').absolute()}, 0 agents" in server.log_text()
        assert "access: this machine's programs, without a token, in clear" in server.log_text()
    with serving(tmp_path / "data", "--kv-bits", "8") as (server, _):
        assert "1 agent, 1 of which can't use their KV with this model (kv_bits: 4 -> 8)" in server.log_text()


def test_data_is_kept_where_the_platform_has_it(tmp_path: Path) -> None:
    """And not in the working directory, where it used to be: what is there still is said."""
    make(tmp_path / "data")
    environment = clean_environment() | {"XDG_DATA_HOME": str(tmp_path / "share")}
    command = [str(WARMKV), "serve", "--port", "0"]
    with (tmp_path / "log").open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on ")
        process.terminate()
    told = (tmp_path / "log").read_text()
    assert "there are contexts in ./data, too: to go on with those, serve with --data-dir data" in told
    assert f"data: {tmp_path / 'share' / 'warmkv'}, 0 agents" in told
    listed = subprocess.run(
        [WARMKV, "store", "ls"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert str(tmp_path / "share" / "warmkv") in listed.stdout
    assert listed.stderr.endswith("there are contexts in ./data, too: --data-dir data\n")
    assert {each.name for each in tmp_path.iterdir()} == {"data", "log", "share"}


def test_loading_is_a_bar_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """Where it takes longer than a moment; and it is gone when calls are served."""
    now, screen = [0.0], io.StringIO()
    bar = Bar(aside=Console(file=screen, force_terminal=True, width=120))
    with caplog.at_level(logging.INFO), StartScreen(lambda: now[0], bar) as start:
        start.tell("reading the weights", 1 << 20, 4 << 20)
        assert not screen.getvalue()
        now[0] = 60.0
        start.tell("reading the weights", 2 << 20, 4 << 20)
        start.tell("checking the weights", 1, 4)
    assert "reading the weights" in screen.getvalue()
    assert "checking the weights" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # the line is erased
    shown = len(screen.getvalue())
    start.tell("checking the weights", 2, 4)  # the thread that loads may be a moment behind
    assert len(screen.getvalue()) == shown
    assert not caplog.messages


def test_loading_is_a_line_now_and_then_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    now, screen = [0.0], io.StringIO()
    with caplog.at_level(logging.INFO), StartScreen(lambda: now[0], Bar(aside=Console(file=screen))) as start:
        for seconds in range(25):
            now[0] = float(seconds)
            start.tell("reading the weights", seconds << 20, 24 << 20)
    assert caplog.messages == ["reading the weights: 11.0 MiB of 24.0 MiB", "reading the weights: 22.0 MiB of 24.0 MiB"]
    assert not screen.getvalue()
