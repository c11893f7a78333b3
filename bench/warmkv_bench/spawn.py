"""A server as a child process, with a data directory of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Self

LISTENING = re.compile(r"listening on (\S+:\d+)\s*$")
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
LOG_LINES = 40


class ServerFailed(Exception):
    """The server did not start, or died; the message ends with the last lines that it wrote."""


class ServerProcess:
    """`warmkv serve` on a free port of this machine.

    `arguments` go to `warmkv serve` as they are, and `environment` to its process. The data directory outlives
    `restart` and is removed at the end, unless the caller named one.
    """

    def __init__(
        self, arguments: Sequence[str], data_dir: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._arguments = list(arguments)
        self._environment = {**os.environ, **(environment or {})}
        self._own_data = data_dir is None
        self.data_dir = data_dir or Path(tempfile.mkdtemp(prefix="warmkv-bench-"))
        self.address = ""
        self._process: asyncio.subprocess.Process | None = None
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self._remove_data()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stop()
        finally:
            self._remove_data()

    @property
    def pid(self) -> int | None:
        """Process id of the running server; None if it does not run."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process is not None and running else None

    async def start(self) -> None:
        """Starts the server and waits until it serves.

        Raises:
            ServerFailed: it ended, or said nothing, before it listened.
        """
        command = [*serve_command(), *self._arguments, "--port", "0", "--data-dir", str(self.data_dir)]
        # A session of its own: a Ctrl-C in the terminal is for the benchmark, which then stops the server in order.
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        self._process = process
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(process.stdout, listening)),
            asyncio.create_task(self._read(process.stderr, None)),
        ]
        ended = asyncio.create_task(process.wait())
        waiting: set[asyncio.Future[str] | asyncio.Future[int]] = {listening, ended}
        await asyncio.wait(waiting, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not listening.done():
            why = "did not listen in time" if process.returncode is None else f"ended with status {process.returncode}"
            await self.stop()
            raise ServerFailed(f"the server {why} ({' '.join(command)}):\n{self.last_lines()}")
        self.address = listening.result()

    async def stop(self) -> None:
        """Ends the server with SIGTERM, and with SIGKILL if it has not drained within a minute."""
        if self._process is None:
            return
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await asyncio.gather(*self._readers)

    async def restart(self) -> None:
        """Stops the server and starts it again on the same data, at a new address."""
        await self.stop()
        await self.start()

    def last_lines(self) -> str:
        """What the server wrote last, for error messages."""
        return "\n".join(self._log) or "(it wrote nothing)"

    async def _read(self, stream: asyncio.StreamReader, listening: asyncio.Future[str] | None) -> None:
        async for raw in _lines(stream):
            line = raw.decode(errors="replace").rstrip()
            self._log.append(line)
            match = LISTENING.search(line)
            if match and listening is not None and not listening.done():
                listening.set_result(match[1])

    def _remove_data(self) -> None:
        if self._own_data:
            shutil.rmtree(self.data_dir, ignore_errors=True)


def serve_command() -> list[str]:
    """The `warmkv serve` that belongs to this interpreter, or else the one on the path.

    Raises:
        ServerFailed: there is none.
    """
    beside = Path(sys.executable).parent / "warmkv"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("warmkv")
    if found is None:
        raise ServerFailed(
            "there is no `warmkv` command to start a server with: install the server "
            "(`make setup`), or name a running one with --target HOST:PORT"
        )
    return [found, "serve"]


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The stream's lines; one longer than the reader's buffer comes in parts instead of ending the reading."""
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as end:
            if end.partial:
                yield end.partial
            return
        except asyncio.LimitOverrunError as full:
            line = await stream.readexactly(full.consumed)
        yield line
