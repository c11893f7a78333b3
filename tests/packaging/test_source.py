"""The server run from its source, as in a checkout whose packages were installed without it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.e2e.harness import Client, clean_environment

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def warmkv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The console command, where nothing says that `warmkv` is installed."""
    site = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_path("platlib")).iterdir():
        if "warmkv" not in entry.name:
            (site / entry.name).symlink_to(entry)
    path = [str(site), *(str(ROOT / folder) for folder in ("server", "stubs", "bench"))]
    program = f"import sys; sys.path[:0] = {path!r}; from warmkv_server.main import main; main()"
    return [sys.executable, "-I", "-S", "-c", program]


def run(command: list[str], *arguments: str | Path) -> str:
    done = subprocess.run(
        [*command, *arguments], env=clean_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_know_the_version(warmkv: list[str], tmp_path: Path) -> None:
    assert run(warmkv, "version").split() == [VERSION]
    lines = run(warmkv, "doctor", "--data-dir", tmp_path).splitlines()
    assert ["warmkv", VERSION] in [line.split() for line in lines]


def test_the_server_knows_its_version(warmkv: list[str], tmp_path: Path) -> None:
    command = [*warmkv, "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().removeprefix("listening on ").strip()
            with Client(address) as client:
                assert client.info().versions["warmkv"] == VERSION
        finally:
            process.terminate()
