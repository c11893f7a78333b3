"""Child processes of peers: started with what they say kept, and ended in order."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from warmkv_bench.peers.peer import PeerFailed

STOP_TIMEOUT_S = 30.0
LAST_LINES = 15


class Child:
    """One child process. Its standard error goes to a file, so that it can never block on a full pipe.

    Args:
        preload: a library that it is to load before all others (LD_PRELOAD), such as a BLAS; None for none.
        environment: further variables, such as a BLAS's settings.
    """

    def __init__(
        self, command: Sequence[str], preload: str | None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = list(command)
        self._environment = {**os.environ, **(environment or {}), **({"LD_PRELOAD": preload} if preload else {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def start(self, *, pipes: bool) -> subprocess.Popen[bytes]:
        """Starts it; with `pipes` its standard input and output are pipes to this process."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in stop)
        end: Any = subprocess.PIPE if pipes else subprocess.DEVNULL
        self._process = subprocess.Popen(
            self.command, stdin=end, stdout=end, stderr=self._log, env=self._environment, start_new_session=True
        )
        return self._process

    def raise_if_ended(self) -> None:
        """Raises PeerFailed with the last lines of its log if it has ended."""
        if self._process is None or self._process.poll() is not None:
            status = None if self._process is None else self._process.returncode
            raise PeerFailed(f"{' '.join(self.command)} ended with status {status}:\n{self.last_lines()}")

    def last_lines(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-LAST_LINES:])

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if it doesn't end within half a minute."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        for pipe in (process.stdin, process.stdout, self._log):
            if pipe is not None:
                pipe.close()
        self._log = None
