"""Starting the processes that do text work, talking to them, and killing them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from warmkv_server.errors import OperatorError
from warmkv_server.text.process import without_mlx
from warmkv_server.text.task import FORK, FORKS, HEADER, KILL, LENGTH, ORDER, Task, TokenizerSource, packed
from warmkv_server.text.trial import Trial

LOAD_SECONDS = 600.0
"""For a process to import what it needs and to load the tokenizer."""
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # a process with threads must not fork
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


class Process(asyncio.Protocol):
    """One process that works.

    Args:
        kill: ends it.
        replied: called with the kind of each reply, whether the process ends itself behind it, and the rest.
        ended: called when it has ended, unless it was killed here.
    """

    def __init__(
        self, kill: Callable[[], None], replied: Callable[[bytes, bool, bytes], None], ended: Callable[[], None]
    ) -> None:
        self._kill = kill
        self._replied = replied
        self._ended = ended
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()
        self._dead = False

    def send(self, task: Task | Trial) -> None:
        assert self._transport is not None
        self._transport.write(packed(task))

    def kill(self) -> None:
        if not self._dead:
            self._dead = True
            self._kill()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= HEADER.size:
            kind, leaving, length = HEADER.unpack_from(self._received)
            end = HEADER.size + length
            if len(self._received) < end:
                return
            body = bytes(memoryview(self._received)[HEADER.size : end])
            del self._received[:end]
            self._replied(kind, bool(leaving), body)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if not self._dead:
            self._dead = True
            self._kill()
            self._ended()


class Launcher:
    """Starts processes; on Linux by having them forked from the first one.

    Made on the event loop's thread, with which they end.

    Args:
        first: the process to begin with; None to start one when it is needed.
    """

    def __init__(self, first: StartedProcess | None) -> None:
        self._numbers = itertools.count()
        self._source = b""
        self._first = first
        self._closed = False

    def tell(self, source: TokenizerSource) -> None:
        """Say what the tokenizer is made of. From any thread, once."""
        self._source = packed(source)
        if self._first is not None:
            self._first.tell(self._source)

    async def loaded(self) -> int:
        """Wait for the tokenizer; returns how many bytes one token stands for at most, 0 for any number.

        Raises:
            OperatorError: if it can't be loaded.
        """
        if self._first is None:
            self._first = StartedProcess.spawn()
            self._first.tell(self._source)
        return await self._first.loaded()

    async def launch(self, replied: Callable[[bytes, bool, bytes], None], ended: Callable[[], None]) -> Process:
        """Start a process that works.

        Raises:
            OSError, OperatorError: if it can't be.
        """
        connection, kill = await (self._forked() if FORKS else self._spawned())
        process = Process(kill, replied, ended)
        await asyncio.get_running_loop().create_unix_connection(lambda: process, sock=connection)
        return process

    def close(self) -> None:
        """End the process that others are forked from, and the others with it."""
        self._closed = True
        if self._first is not None:
            self._first.kill()

    async def _forked(self) -> tuple[socket.socket, Callable[[], None]]:
        own, other = socket.socketpair()
        own.setblocking(False)
        number = next(self._numbers)
        with other:
            try:
                assert self._first is not None
                socket.send_fds(self._first.control, [ORDER.pack(FORK, number)], [other.fileno()])
            except OSError:  # it has ended, which it never does by itself
                self._first = await self._anew()
                socket.send_fds(self._first.control, [ORDER.pack(FORK, number)], [other.fileno()])
        parent = self._first

        def kill() -> None:
            with contextlib.suppress(OSError):  # then it is gone, and those that it had forked
                parent.control.send(ORDER.pack(KILL, number))

        return own, kill

    async def _spawned(self) -> tuple[socket.socket, Callable[[], None]]:
        started, self._first = self._first or await self._anew(), None
        return started.control, started.kill

    async def _anew(self) -> StartedProcess:
        started = StartedProcess.spawn()
        if self._closed:
            started.kill()
        started.tell(self._source)
        await started.loaded()
        return started


class StartedProcess:
    """A process as it is started: it waits for the tokenizer's source, loads it, and says so.

    Args:
        control: what it is talked to by.
        end: ends it, and waits until it has ended.
    """

    def __init__(self, control: socket.socket, end: Callable[[], None]) -> None:
        self.control = control
        self.control.setblocking(False)
        self._end = end

    @classmethod
    def first(cls) -> StartedProcess:
        """The one of a server: to be called before MLX is imported and before there are threads.

        Where processes can be forked it is forked from this one, so that what both need of transformers, seconds of
        imports, is imported once. A process that has MLX already doesn't fork.
        """
        return cls._fork() if FORKS and "mlx" not in sys.modules else cls.spawn()

    @classmethod
    def spawn(cls) -> StartedProcess:
        """One that begins from nothing."""
        own, other = socket.socketpair()
        with other:
            process = subprocess.Popen(
                [sys.executable, "-m", "warmkv_server.text.process", str(other.fileno())],
                pass_fds=(other.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT, "WARMKV_BLAS": "reference"},  # that is: load none
            )

        def end() -> None:
            process.kill()
            process.wait()

        return cls(own, end)

    @classmethod
    def _fork(cls) -> StartedProcess:
        own, other = socket.socketpair()
        os.environ.update(_ENVIRONMENT)
        with without_mlx():
            from warmkv_server.text.work import main
        pid = os.fork()
        if not pid:
            try:
                own.close()
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, 0)
                os.dup2(nothing, 1)
                main(other.detach())
            finally:
                os._exit(0)
        other.close()

        def end() -> None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

        return cls(own, end)

    def tell(self, source: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended; `loaded` says so
            self.control.sendall(source)

    async def loaded(self) -> int:
        try:
            said = await asyncio.wait_for(self._said(), LOAD_SECONDS)
        except TimeoutError:
            said = f"it took longer than {LOAD_SECONDS:.0f} seconds"
        if isinstance(said, int):
            return said
        self.kill()
        raise OperatorError(f"the process that tokenises could not be started: {said}")

    async def _said(self) -> int | str:
        loop = asyncio.get_running_loop()
        data = b""
        while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
            more = await loop.sock_recv(self.control, 4096)
            if not more:
                return "it ended"
            data += more
        said: int | str = json.loads(data[LENGTH.size :])
        return said

    def kill(self) -> None:
        if self.control.fileno() >= 0:
            self._end()
            self.control.close()
