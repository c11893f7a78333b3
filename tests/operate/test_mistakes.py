"""What operators do wrong, and the one sentence that each is told: what, why, and what to do. Exit status 2."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import assert_one_sentence, run_warmkv
from tests.offline.commands import refusal
from warmkv_server import config
from warmkv_server.app import serve
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import OperatorError
from warmkv_server.kv.store import Store

TLS = Path(__file__).parents[1] / "e2e" / "tls"

SETTINGS: dict[str, tuple[str, str]] = {
    "--port 70000": ("--port (WARMKV_PORT) can't be '70000'", "less than or equal to 65535"),
    "--port http": ("--port", "valid integer"),
    "--health-port 0": ("--health-port", "greater than or equal to 1"),
    "--metrics-port x": ("--metrics-port", "valid integer"),
    "--kv-bits 5": ("--kv-bits", "0, 4 or 8"),
    "--kv-group-size 48": ("--kv-group-size", "32, 64 or 128"),
    "--durability always": ("--durability", "'full', 'fsync' or 'none'"),
    "--log-level loud": ("--log-level", "'warning'"),
    "--prefill-chunk 100": ("--prefill-chunk", "multiple of 256"),
    "--max-batch 0": ("--max-batch", "greater than or equal to 1"),
    "--max-queue -1": ("--max-queue", "greater than or equal to 1"),
    "--speculate-tokens 65": ("--speculate-tokens", "less than or equal to 64"),
    "--hot-bytes much": ("--hot-bytes", "byte string"),
    "--disk-bytes 5XB": ("--disk-bytes", "byte unit"),
    "--inflight-bytes -1": ("--inflight-bytes", "byte string"),
    "--max-message-bytes 10": ("--max-message-bytes", "1024"),
    "--keep-anonymous 7200": ("--keep-anonymous", "such as 30d"),
    "--keep-anonymous 0s": ("--keep-anonymous", "greater than 0"),
    "--anonymous-bytes 0": ("--anonymous-bytes", "greater than or equal to 1"),
    "--load-seconds 0": ("--load-seconds", "greater than 0"),
    "--drain-seconds soon": ("--drain-seconds", "valid number"),
    "--context-limit 1": ("--context-limit", "greater than or equal to 2"),
    "--default-max-tokens 0": ("--default-max-tokens", "greater than or equal to 1"),
    "--host 0.0.0.0": ("neither TLS nor tokens", "--insecure-bind"),
    "--host ::": ("neither TLS nor tokens", "--token-file"),
    "--tls-cert x": ("need each other", "--tls-key"),
    "--tls-key x": ("need each other", "--tls-cert"),
    "--config /no/settings.toml": ("/no/settings.toml", "No such file"),
    "WARMKV_HOT_BYTES=much": ("WARMKV_HOT_BYTES", "byte string"),
    "WARMKV_HOTBYTES=1GiB": ("WARMKV_HOTBYTES", "WARMKV_HOT_BYTES is meant"),
    "WARMKV_PROT=1": ("WARMKV_PROT", "WARMKV_PORT is meant"),
    "WARMKV_TOKENS_FILE=x": ("WARMKV_TOKENS_FILE", "WARMKV_TOKEN_FILE is meant"),
    "WARMKV_CONFIG=/no/file": ("/no/file", "No such file"),
}
"""By what is on the command line or in the environment."""

FILES: dict[str, tuple[str, str]] = {
    "port = ": ("not TOML", "{file}"),
    "porrt = 1": ("'porrt', which is no setting", "'port' is meant"),
    "elephants = 1": ("'elephants', which is no setting", "warmkv config show"),
    "port = 'x'": ("--port", "as {file} has it"),
    "port = 1.5": ("--port", "as {file} has it"),
    "port = [1]": ("--port", "as {file} has it"),
    "[server]\nport = 1": ("'server', which is no setting", "{file}"),
    "hot_bytes = 1\nhot-bytes = 2": ("twice", "hot-bytes"),
    "insecure_bind = 'perhaps'": ("--insecure-bind", "boolean"),
}
"""By what is in a file of settings."""

OTHER_COMMANDS: dict[str, str] = {
    "store ls --data-dir {tmp}/nowhere": "not a data directory",
    "store verify --data-dir {tmp}/nowhere": "not a data directory",
    "store gc --data-dir {tmp}/nowhere": "not a data directory",
    "store gc --data-dir {tmp} --agents-unused-for soon": "no duration",
    "store rebuild-index --data-dir {tmp}": "not a data directory",
    "agents export a -o {tmp}/a --data-dir {tmp}/nowhere": "not a data directory",
    "agents import {tmp}/nothing --data-dir {tmp}": "nothing",
    "agents import {tmp}/nothing --data-dir {tmp} --kv-bits 8": "goes with --model",
    "models check /no/such/folder": "no model at '/no/such/folder'",
    "models check builtin:huge": "builtin:tiny",
    "models check random:triangle": "known are",
    "models check builtin:tiny --kv-bits 3": "--kv-bits",
    "config show --port x": "--port",
}

TOKENS: dict[str, str] = {
    "": "no token",
    "one": "line 1",
    "a b\n\na b c d # no": "line 3",
    "red same\nblue same": "line 2 of the token file {tmp}/file has the token of an earlier line",
    "red same\nred same team-": "other agents",
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WARMKV_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_setting(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = mistake.split() if mistake.startswith("--") else []
    if not arguments:
        monkeypatch.setenv(*mistake.split("=", 1))
    said = refusal("serve", *arguments)
    for word in SETTINGS[mistake]:
        assert word in said


@pytest.mark.parametrize("content", FILES)
def test_a_file_of_settings(content: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    said = refusal("serve", "--config", file)
    for word in FILES[content]:
        assert word.format(file=file) in said


@pytest.mark.parametrize("command", OTHER_COMMANDS)
def test_another_command(command: str, tmp_path: Path) -> None:
    assert OTHER_COMMANDS[command] in refusal(*command.format(tmp=tmp_path).split())


def refused_before_the_model(tmp_path: Path, **flags: object) -> str:
    """What a server says that has not loaded a model yet: one that isn't there, so that nothing else can be meant."""
    flags = {"port": "0", "data_dir": tmp_path / "data", "model": "/no/such/model", **flags}
    text: Any = None  # no process for text work is needed before there is a model
    with pytest.raises(OperatorError) as caught:
        asyncio.run(serve(config.read(flags), text, print))
    said = str(caught.value)
    assert "\n" not in said
    assert "/no/such/model" not in said
    return said


@pytest.mark.parametrize("content", TOKENS)
def test_a_token_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    assert TOKENS[content].format(tmp=tmp_path) in refused_before_the_model(tmp_path, token_file=tmp_path / "file")


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    assert "/no/tokens" in refused_before_the_model(tmp_path, token_file="/no/tokens")


@pytest.mark.parametrize(("certificate", "key"), [("no", "key"), ("certificate", "no"), ("key", "certificate")])
def test_a_certificate(certificate: str, key: str, tmp_path: Path) -> None:
    pair = {"tls_cert": TLS / f"{certificate}.pem", "tls_key": TLS / f"{key}.pem"}
    assert f"certificate {pair['tls_cert']} and key {pair['tls_key']} can't be used" in refused_before_the_model(
        tmp_path, **pair
    )


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield str(taken.getsockname()[1])


@pytest.mark.parametrize("flag", ["port", "health_port", "metrics_port"])
def test_a_port_that_is_taken(flag: str, taken_port: str, tmp_path: Path) -> None:
    said = refused_before_the_model(tmp_path, **{flag: taken_port})
    assert taken_port in said
    assert f"--{flag.replace('_', '-')}" in said


@pytest.mark.parametrize("flag", ["host", "metrics_host"])
def test_an_address_that_is_none(flag: str, tmp_path: Path) -> None:
    open_anyway = {"insecure_bind": "true", "metrics_port": "1"}
    assert "no such host" in refused_before_the_model(tmp_path, **{flag: "no such host"}, **open_anyway)


def test_traces_that_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    said = refused_before_the_model(tmp_path, tracing="true")
    assert "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json'" in said
    assert "http/protobuf" in said
    monkeypatch.delitem(sys.modules, "warmkv_server.service.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # as if it were not installed
    said = refused_before_the_model(tmp_path, tracing="true")
    assert "--tracing needs OpenTelemetry" in said
    assert "`otel`" in said


def test_a_data_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        said = refused_before_the_model(tmp_path, data_dir=place)
        assert f"the data directory {place} can't be prepared" in said
        assert "--data-dir" in said


def test_budgets_beyond_the_memory_are_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for hot_bytes, warned in (("1MiB", False), ("1PiB", True)):
        caplog.clear()
        nowhere = {"host": "no such host", "insecure_bind": "true"}
        refused_before_the_model(tmp_path / hot_bytes, hot_bytes=hot_bytes, inflight_bytes="1MiB", **nowhere)
        assert ("with full budgets the system ends the server" in caplog.text) == warned


def test_real_processes_say_the_same(tmp_path: Path) -> None:
    """What is found at each of the stages of a start."""
    serve_on: list[str | Path] = ["serve", "--port", "0", "--data-dir", tmp_path / "data"]
    assert_one_sentence(run_warmkv("serve", "--kv-bits", "5"), "--kv-bits")
    assert_one_sentence(run_warmkv(*serve_on, "--token-file", "/no/tokens"), "/no/tokens")
    assert_one_sentence(run_warmkv(*serve_on, "--context-limit", "1000000"), "--context-limit")
    shutil.rmtree(tmp_path / "data")
    assert_one_sentence(run_warmkv(*serve_on, "--disk-bytes", "1000"), "--disk-bytes 1000", "one block of 256 tokens")


def test_a_data_directory_in_use(tmp_path: Path) -> None:
    held = asyncio.run(Store.take(Settings(data_dir=tmp_path / "data")))
    try:
        assert "is in use by process" in refused_before_the_model(tmp_path)
    finally:
        held.release()
