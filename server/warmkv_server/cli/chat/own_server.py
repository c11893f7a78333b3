"""A server that lives as long as the chat that started it."""

from __future__ import annotations

import contextlib
import subprocess
import sys

from warmkv_server.contract.settings import LOOPBACK
from warmkv_server.errors import OperatorError
from warmkv_server.platform import places

_STOP_SECONDS = 60.0


class OwnServer:
    """`warmkv serve` on an address of this machine.

    Args:
        target: HOST:PORT where clients will look for it.

    Attributes:
        log: what it says on stderr.

    Raises:
        OperatorError: the address is another machine's.
    """

    def __init__(self, target: str, model: str | None) -> None:
        host, _, port = target.rpartition(":")
        host = host.strip("[]")
        if host not in LOOPBACK or not port.isdigit():
            raise OperatorError(f"--spawn can't start a server at {target}: give an address of this machine's own")
        program = "from warmkv_server.main import main; main()"
        self._command = [sys.executable, "-c", program, "serve", "--host", host, "--port", port]
        self._command += ["--model", model] if model is not None else []
        self._process: subprocess.Popen[str] | None = None
        self.log = places.state_dir() / "chat-server.log"

    def ensure(self) -> None:
        """Have it serve: start it, or start it again if it has ended.

        Raises:
            OperatorError: it ends before it serves.
        """
        if self._process is not None and self._process.poll() is None:
            return
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self.log.open("w") as log:
                # In a session of its own: a Ctrl-C in the terminal is for the answer, not for the server.
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
        except OSError as error:
            raise OperatorError(f"the server's log {self.log} can't be written: {error.strerror or error}") from error
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("listening on "):
                return
        last = (self.log.read_text(errors="replace").splitlines() or ["it said nothing"])[-1]
        raise OperatorError(f"the server ended with status {self._process.wait()}: {last.removeprefix('warmkv: ')}")

    def stop(self) -> None:
        """Have it end in order; what was committed is on disk either way."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
            return
        self._process.kill()
        self._process.wait()
