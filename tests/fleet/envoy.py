"""A real Envoy, with the configuration that `warmkv fleet envoy` writes."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.harness import WARMKV, clean_environment, free_port

ENVOY = Path(os.environ.get("WARMKV_ENVOY", Path(__file__).parents[2] / ".fleet" / "bin" / "envoy"))
SECONDS = 60.0


class Envoy:
    """Leads to the servers that `lead_to` named last.

    Attributes:
        address: where clients come.
    """

    def __init__(self, folder: Path, servers: Mapping[str, str]) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self._admin = f"127.0.0.1:{free_port()}"
        self.lead_to(servers)
        command: list[str | Path] = [
            ENVOY,
            "-c",
            folder / "envoy.yaml",
            "--use-dynamic-base-id",
            "--concurrency",
            "2",
            "-l",
            "warning",
        ]
        with (folder / "envoy.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.await_healthy(servers)

    def lead_to(self, servers: Mapping[str, str], draining: Sequence[str] = ()) -> None:
        """
        Args:
            servers: address of each by its name.
            draining: names of those to lead agents away from.
        """
        command: list[str | Path] = [
            WARMKV,
            "fleet",
            "envoy",
            "--listen",
            self.address,
            "--admin",
            self._admin,
            "--out",
            self.folder,
        ]
        for name, address in servers.items():
            command += ["--server", f"{name}={address}"]
        for name in draining:
            command += ["--draining", name]
        subprocess.run(command, check=True, env=clean_environment(), stdout=subprocess.DEVNULL)

    def await_healthy(self, servers: Mapping[str, str]) -> None:
        """Wait until it leads to these and no others."""
        deadline = time.monotonic() + SECONDS
        while self.healthy() != set(servers.values()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Envoy leads to {self.healthy()}:\n{(self.folder / 'envoy.log').read_text()[-4000:]}")
            time.sleep(0.05)  # Envoy tells nobody

    def healthy(self) -> set[str]:
        """Addresses of the servers that it leads to."""
        try:
            with urllib.request.urlopen(f"http://{self._admin}/clusters", timeout=SECONDS) as response:
                lines = response.read().decode().splitlines()
        except OSError:
            return set()
        fields = [line.split("::") for line in lines if "::health_flags::" in line]
        return {field[1] for field in fields if field[3] == "healthy"}


@contextmanager
def envoy(folder: Path, servers: Mapping[str, str]) -> Iterator[Envoy]:
    folder.mkdir()
    running = Envoy(folder, servers)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
