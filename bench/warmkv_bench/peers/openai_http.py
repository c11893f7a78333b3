"""Servers with OpenAI's completions API over HTTP, streamed. One of them is a command line and a few fields."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from pathlib import Path
from typing import Any

from warmkv_bench.peers.child import Child
from warmkv_bench.peers.peer import Completion, PeerFailed

START_TIMEOUT_S = 300.0
POLL_S = 0.1
HOST = "127.0.0.1"


class OpenAIServer:
    """A child process that serves `/v1/completions`.

    Args:
        command: starts it; `{port}` is replaced by a free port.
        fields: of every request's body, beside prompt, length and streaming: what makes this server answer greedily and
            not stop early.
        preload: see Child.
    """

    def __init__(
        self, name: str, command: list[str], fields: dict[str, Any], preload: str | None, timeout_s: float
    ) -> None:
        self.name = name
        self._command = command
        self._fields = fields
        self._preload = preload
        self._timeout_s = timeout_s
        self._port = 0
        self._child: Child | None = None

    async def start(self) -> None:
        self._port = _free_port()
        self._child = Child([part.replace("{port}", str(self._port)) for part in self._command], self._preload)
        self._child.start(pipes=False)
        # Nothing tells when such a server is ready but an answer.
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            self._child.raise_if_ended()
            try:
                await self.ask("", "hello", 1)
            except PeerFailed as failure:
                if time.monotonic() > deadline:
                    raise PeerFailed(f"{self.name} did not answer in time: {failure}") from None
                await asyncio.sleep(POLL_S)
            else:
                return

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop()
            self._child = None

    async def ask(self, session: str, prompt: str, output_tokens: int) -> Completion:
        del session  # such servers go by the prompt alone
        body = {
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }
        return await asyncio.to_thread(self._stream, json.dumps(body))

    async def close(self) -> None:
        await self.stop()

    def _stream(self, body: str) -> Completion:
        completion = Completion()
        connection = http.client.HTTPConnection(HOST, self._port, timeout=self._timeout_s)
        try:
            connection.connect()  # as on the other side, the connection is not part of the measurement
            begin = time.perf_counter_ns()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise PeerFailed(f"{self.name} answered {response.status}: {response.read(500).decode()}")
            for line in response:
                if line.startswith(b"data: {"):
                    _take(json.loads(line[6:]), (time.perf_counter_ns() - begin) / 1e6, completion)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise PeerFailed(f"{self.name}: {error!r}") from None
        finally:
            connection.close()
        return completion


def mlx_lm_server(
    python: str, model: Path, end_tokens: list[int], preload: str | None, timeout_s: float
) -> OpenAIServer:
    """mlx-lm's own server. It has no way to ignore the end of sequence, so that gets a bias against it."""
    command = [python, "-m", "mlx_lm", "server", "--model", str(model), "--host", HOST, "--port", "{port}"]
    fields = {"logit_bias": {str(token): -100.0 for token in end_tokens}}
    return OpenAIServer("mlx_lm.server", command, fields, preload, timeout_s)


def _take(event: dict[str, Any], now_ms: float, completion: Completion) -> None:
    choices = event.get("choices") or []
    if choices and choices[0].get("text"):
        completion.piece_times_ms.append(now_ms)
    usage = event.get("usage")
    if usage:
        completion.prompt_tokens = usage["prompt_tokens"]
        completion.output_tokens = usage["completion_tokens"]
        completion.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
