"""mlx-lm without a server: a program that holds the model and one prompt cache, asked over a pipe."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from warmkv_bench.peers.child import Child
from warmkv_bench.peers.peer import Completion, PeerFailed


class MLXLMProcess:
    """Adapter of `mlx_lm_child.py`. What it measures has no network and no other request in it."""

    name = "mlx-lm"

    def __init__(self, python: str, model: Path, preload: str | None) -> None:
        script = Path(__file__).with_name("mlx_lm_child.py")
        self._child = Child([python, str(script), str(model)], preload)
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self._process = self._child.start(pipes=True)
        if not (await asyncio.to_thread(self._read)).get("ready"):
            raise PeerFailed(f"mlx-lm did not start:\n{self._child.last_lines()}")

    async def stop(self) -> None:
        await self._child.stop()
        self._process = None

    async def ask(self, session: str, prompt: str, output_tokens: int) -> Completion:
        return await asyncio.to_thread(self._ask, {"session": session, "prompt": prompt, "tokens": output_tokens})

    async def close(self) -> None:
        await self.stop()

    def _ask(self, request: dict[str, Any]) -> Completion:
        if self._process is None or self._process.stdin is None:
            raise PeerFailed("mlx-lm is not running")
        completion = Completion()
        begin = time.perf_counter_ns()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerFailed(f"mlx-lm: {error}") from None
        while "done" not in (event := self._read()):
            completion.piece_times_ms.append((time.perf_counter_ns() - begin) / 1e6)
        completion.prompt_tokens = event["prompt_tokens"]
        completion.cached_tokens = event["cached_tokens"]
        completion.output_tokens = len(completion.piece_times_ms)
        return completion

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._child.raise_if_ended()
            raise PeerFailed(f"mlx-lm closed its pipe:\n{self._child.last_lines()}")
        event: dict[str, Any] = json.loads(line)
        return event
