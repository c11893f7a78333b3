"""Flags win over the environment, which wins over the defaults."""

from __future__ import annotations

import pytest

from warmkv_server.config import Settings
from warmkv_server.errors import OperatorError
from warmkv_server.platform import places


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"WARMKV_{name.upper()}", raising=False)


def test_defaults() -> None:
    settings = Settings.read({})
    assert (settings.model, settings.host, settings.port) == ("builtin:tiny", "127.0.0.1", 50051)
    assert settings.data_dir == places.data_dir()
    assert settings.data_dir.is_absolute()
    assert settings.hot_bytes > 1 << 20


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMKV_PORT", "1")
    monkeypatch.setenv("WARMKV_HOT_BYTES", "3GiB")
    monkeypatch.setenv("WARMKV_KV_BITS", "8")
    settings = Settings.read({"port": "2"})
    assert (settings.port, settings.hot_bytes, settings.kv_bits) == (2, 3 << 30, 8)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_addresses_need_protection(host: str) -> None:
    with pytest.raises(OperatorError, match="--insecure-bind"):
        Settings.read({"host": host})
    for protection in ({"token_file": "t"}, {"tls_cert": "c", "tls_key": "k"}, {"insecure_bind": True}):
        assert Settings.read({"host": host, **protection}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machines_own_need_none(host: str) -> None:
    assert Settings.read({"host": host}).host == host


@pytest.mark.parametrize(
    "flags", [{"port": "x"}, {"kv_bits": "3"}, {"durability": "some"}, {"max_batch": "0"}, {"hot_bytes": "-1"}], ids=str
)
def test_a_wrong_setting_is_named_with_both_its_names(flags: dict[str, object]) -> None:
    (name,) = flags
    with pytest.raises(OperatorError, match=rf"--{name.replace('_', '-')} \(WARMKV_{name.upper()}\) can't be"):
        Settings.read(flags)
