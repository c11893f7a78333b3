"""mlx-lm in a process of its own, asked over a pipe; it times itself."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from warmkv_bench.peers.child import Child
from warmkv_bench.peers.peer import PeerFailed


class MLXLM:
    """`child.py` on one model. An `async with` starts and ends it.

    Args:
        folder: the model.
        preload: the BLAS library that it loads before all others; None for the one that MLX brings.
        environment: further variables, such as a BLAS's settings.
    """

    def __init__(self, folder: Path, preload: str | None, environment: Mapping[str, str]) -> None:
        script = Path(__file__).with_name("child.py")
        self._child = Child([sys.executable, str(script), str(folder)], preload, environment)
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        self._process = self._child.start(pipes=True)
        try:
            await asyncio.to_thread(self._read)
        except BaseException:
            await self._child.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._child.stop()
        self._process = None

    async def ttft(self, suffix: Sequence[int], *, prefix: int = 0, form: str = "fp", step: int = 2048) -> float:
        """Milliseconds to the first token of `suffix` behind `prefix` held tokens."""
        reply = await self._ask("ttft", prefix=prefix, form=form, suffix=list(suffix), step=step)
        return float(reply["ms"])

    async def decode(self, suffix: Sequence[int], *, prefix: int, form: str, tokens: int) -> list[float]:
        """When each of one stream's tokens came, in milliseconds since the first."""
        reply = await self._ask("decode", prefix=prefix, form=form, suffix=list(suffix), tokens=tokens)
        return list(reply["ms"])

    async def batch(
        self, suffixes: Sequence[Sequence[int]], *, prefix: int, form: str, tokens: int
    ) -> list[list[float]]:
        """When each row of a BatchGenerator got each token, in milliseconds since the first of all."""
        rows = [list(suffix) for suffix in suffixes]
        reply = await self._ask("batch", prefix=prefix, form=form, suffixes=rows, tokens=tokens)
        return list(reply["ms"])

    async def _ask(self, operation: str, **what: Any) -> dict[str, Any]:
        return await asyncio.to_thread(self._exchange, {"operation": operation, **what})

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerFailed(f"mlx-lm: {error}:\n{self._child.last_lines()}") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(f"mlx-lm ended:\n{self._child.last_lines()}")
        event: dict[str, Any] = json.loads(line)
        return event
