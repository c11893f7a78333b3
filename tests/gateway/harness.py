"""A real gateway in front of real servers, and the clients that people have."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import anthropic
import openai
import pytest

from tests.e2e.harness import Client, Server, free_port
from tools import gateway

MODEL = "tiny"
START_SECONDS = 120.0
Found = TypeVar("Found")

Said = list[dict[str, Any]]
"""Messages, as clients keep them."""


class Worker:
    """A server with its port for a gateway, on the same ports after each start.

    Attributes:
        own: a client of our own API; of the server that runs now.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = free_port()
        self._folder = folder
        self._flags = ("--gateway-port", str(self.port), *flags)
        self.start()

    def start(self) -> None:
        self.server = Server(self._folder, *self._flags)
        self.own = Client(self.server.address)

    def kill(self) -> None:
        """kill -9."""
        self.own.channel.close()
        self.server.kill()

    def chats(self) -> int:
        """How many chats it has answered since its folder was made; not what the gateway's start is tried with."""
        log = self.server.log_text()
        return log.count("rpc=Generate ") - log.count("rpc=Generate id=cmpl-")


class Gateway:
    """Shepherd Model Gateway, and its clients."""

    def __init__(self, folder: Path, workers: Sequence[Worker]) -> None:
        self._log = folder / "gateway.log"
        self.port = free_port()
        self._workers = [worker.port for worker in workers]
        self.openai = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=f"http://127.0.0.1:{self.port}", api_key="none", max_retries=0)
        self.start()

    def start(self) -> None:
        told = gateway.command(self.port, free_port(), self._workers, "--sse-keepalive-secs", "1")
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(told, stdout=log, stderr=log)
        eventually(lambda: gateway.ready(self.port), self._why)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def chat(self, said: Said, agent_id: str = "", **more: Any) -> Any:
        """One chat completion, greedy unless it is told otherwise."""
        headers = {gateway.AGENT_HEADER: f"agent:{agent_id}#"} if agent_id else {}
        asked = {"model": MODEL, "messages": said, "max_tokens": 16, "temperature": 0} | more
        return self.openai.chat.completions.create(**asked, extra_headers=headers)

    def streams(self) -> int:
        """How often a server has begun to tell it what it holds."""
        return self._log.read_text(errors="replace").count("KV event stream connected")

    def knows(self, workers: int) -> bool:
        """Whether it takes so many servers for healthy."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/workers", timeout=5) as answer:
            told = json.load(answer)
        return sum(bool(each.get("is_healthy")) for each in told["workers"]) == workers

    def _why(self) -> str:
        return self._log.read_text(errors="replace")[-5000:]


def user(said: str) -> Said:
    return [{"role": "user", "content": said}]


def eventually(look: Callable[[], Found], why: Callable[[], str] = str, seconds: float = START_SECONDS) -> Found:
    """What is found once it is true."""
    give_up = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > give_up:
            pytest.fail(f"it didn't happen within {seconds} seconds: {why()}")
        time.sleep(0.05)
    return found


@contextmanager
def running(folder: Path, *flags: str, workers: int = 1) -> Iterator[tuple[Gateway, list[Worker]]]:
    """A gateway and its servers for the block."""
    behind = [Worker(folder / f"worker{number}", *flags) for number in range(workers)]
    try:
        front = Gateway(folder, behind)
        try:
            yield front, behind
        finally:
            front.stop()
    finally:
        for worker in behind:
            worker.kill()
    for worker in behind:
        log = worker.server.log_text()
        assert "internal error" not in log, log
        assert "Traceback" not in log, log
