"""Flags win over the environment, which wins over the defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.offline.commands import run, run_json
from warmkv_server import config
from warmkv_server.errors import OperatorError
from warmkv_server.platform import places

SERVER = Path(config.__file__).parent


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in config.options():
        monkeypatch.delenv(option.variable, raising=False)


def test_defaults() -> None:
    settings = config.read({})
    assert (settings.model, settings.host, settings.port) == ("builtin:tiny", "127.0.0.1", 50051)
    assert settings.data_dir == places.data_dir()
    assert settings.data_dir.is_absolute()
    assert settings.hot_bytes > 1 << 20


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMKV_PORT", "1")
    monkeypatch.setenv("WARMKV_HOT_BYTES", "3GiB")
    monkeypatch.setenv("WARMKV_KV_BITS", "8")
    settings = config.read({"port": "2"})
    assert (settings.port, settings.hot_bytes, settings.kv_bits) == (2, 3 << 30, 8)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_addresses_need_protection(host: str) -> None:
    with pytest.raises(OperatorError, match="--insecure-bind"):
        config.read({"host": host})
    for protection in ({"token_file": "t"}, {"tls_cert": "c", "tls_key": "k"}, {"insecure_bind": True}):
        assert config.read({"host": host, **protection}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machines_own_need_none(host: str) -> None:
    assert config.read({"host": host}).host == host


def test_a_file_stands_under_the_environment_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 1\nmax-batch = 5\nhot_bytes = "1GiB"\ndrain_seconds = 2\ninsecure_bind = true\n')
    monkeypatch.setenv("WARMKV_PORT", "2")
    monkeypatch.setenv("WARMKV_MAX_BATCH", "6")
    told = config.tell({"port": "3"}, file)
    settings = told.settings
    assert (settings.port, settings.max_batch, settings.hot_bytes, settings.drain_seconds) == (3, 6, 1 << 30, 2.0)
    assert settings.insecure_bind is True
    assert {name: told.origins[name] for name in ("port", "max_batch", "hot_bytes", "model")} == {
        "port": "--port",
        "max_batch": "WARMKV_MAX_BATCH",
        "hot_bytes": str(file),
        "model": "the default",
    }
    monkeypatch.setenv("WARMKV_CONFIG", str(file))
    assert config.read({}).hot_bytes == 1 << 30


def test_config_show_says_where_each_value_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMKV_KV_BITS", "8")
    shown = run_json("config", "show", "--data-dir", "/somewhere")
    assert set(shown) == {option.name for option in config.options()}
    assert shown["kv_bits"] == {"value": 8, "from": "WARMKV_KV_BITS"}
    assert shown["data_dir"] == {"value": "/somewhere", "from": "--data-dir"}
    lines = run("config", "show", "--data-dir", "/somewhere").stdout.splitlines()
    assert ["kv_bits", "8", "WARMKV_KV_BITS"] in [line.split() for line in lines]


@pytest.mark.parametrize(
    "name", ["WARMKV_SERVICE_HOST", "WARMKV_PORT_50051_TCP_ADDR", "WARMKV_BLAS", "WARMKV_ELEPHANTS"]
)
def test_what_others_put_into_the_environment_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "tcp://10.0.0.1")
    assert config.read({}).port == 50051


def test_every_option_is_declared_once_and_acted_on() -> None:
    """Nothing that is accepted does nothing."""
    sources = {path: path.read_text(encoding="utf-8") for path in SERVER.rglob("*.py")}
    declared = SERVER / "contract" / "settings.py"
    for option in config.options():
        taken = re.compile(rf"[Ss]ettings\.{option.name}\b")
        assert any(taken.search(text) for path, text in sources.items() if path != declared), option.name
        assert len(re.findall(rf"^    {option.name}: Annotated", sources[declared], re.MULTILINE)) == 1


def test_a_gateway_is_this_machines_and_has_a_tenant_where_there_are_tokens() -> None:
    assert config.read({"gateway_port": 5, "keep_anonymous": "2h"}).gateway_host == "127.0.0.1"
    assert config.read({"gateway_port": 5, "token_file": "t", "gateway_tenant": "ours"}).gateway_tenant == "ours"
    with pytest.raises(OperatorError, match=r"--gateway-host 0\.0\.0\.0 .*--insecure-bind"):
        config.read({"gateway_port": 5, "gateway_host": "0.0.0.0"})
    for wrong in ({"token_file": "t"}, {"gateway_tenant": "ours"}):
        with pytest.raises(OperatorError, match="--gateway-tenant"):
            config.read({"gateway_port": 5, **wrong})
