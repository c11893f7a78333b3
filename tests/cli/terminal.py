"""A command in a terminal of its own, as a person has it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import pytest

from tests.e2e.harness import WARMKV, clean_environment

PATIENCE = 120.0
_ORDERS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|\x1b[=>78]")
_UNFINISHED = re.compile(r"\x1b[^a-zA-Z]*$")


class Terminal:
    """
    Attributes:
        seen: all that it showed, without orders to the terminal.
    """

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self._fd = fd
        self.process = process
        self.seen = ""
        self._rest = ""
        self._read_up_to = 0

    def expect(self, pattern: str) -> str:
        """Wait for it behind what was expected before, and return what there was up to its end."""
        give_up = time.monotonic() + PATIENCE
        while not (found := re.compile(pattern).search(self.seen, self._read_up_to)):
            if time.monotonic() > give_up or not self._read():
                pytest.fail(f"{pattern!r} didn't come behind this:\n{self.seen}")
        before = self.seen[self._read_up_to : found.end()]
        self._read_up_to = found.end()
        return before

    def type(self, line: str) -> None:
        self.send(f"{line}\r")

    def send(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait(self) -> int:
        """Read to the end, and return the exit status."""
        give_up = time.monotonic() + PATIENCE
        while self._read():
            assert time.monotonic() < give_up, f"it doesn't end:\n{self.seen[-2000:]}"
        return self.process.wait(PATIENCE)

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 1.0)[0]:
            return self.process.poll() is None
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # Linux: the last one that had it open is gone
            return False
        text = self._rest + data.decode(errors="replace")
        whole = _UNFINISHED.split(text)[0]
        self._rest = text[len(whole) :]
        self.seen += _ORDERS.sub("", whole)
        return bool(data)


@contextmanager
def terminal(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, columns: int = 120
) -> Iterator[Terminal]:
    """`warmkv` in a terminal; killed at the end of the block if it still runs."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    everything = (
        clean_environment() | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | dict(environment or {})
    )
    for size in ("COLUMNS", "LINES"):  # a worker's own, which would go before the terminal's
        everything.pop(size, None)
    process = subprocess.Popen(
        [WARMKV, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=everything,
        start_new_session=True,
        preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
        os.close(ours)
