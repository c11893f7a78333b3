"""What listens: a gRPC server that no request can end, and another in its place should it end all the same."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import grpc
import grpc.aio
from grpc._cython import cygrpc
from grpc.aio._server import Server

log = logging.getLogger(__name__)

Options = Sequence[tuple[str, Any]]
Bind = Callable[[grpc.aio.Server, int], int]
"""Has a server listen on a port, 0 for a free one, and returns it; RuntimeError if it can't be had."""

_LOOK_SECONDS = 1.0
_AGAIN_SECONDS, _PAUSE_SECONDS = 10.0, 0.1


class _Blame(logging.Filter):
    """Keeps what clients did wrong out of the log.

    Handlers catch what they raise, so that gRPC logs tracebacks only of what it finds malformed, and of answers to
    clients that are gone: as many as a stranger likes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return record.exc_info is None or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_BLAME = _Blame()


class Listener:
    """A server on one port. If it ends without being told to, a new one takes the port, and what runs goes on.

    Args:
        make: a server with its methods, ready to be bound and started.
        bind: has it listen.

    Attributes:
        lost: done if no new server could take the port either.
    """

    def __init__(self, make: Callable[[], grpc.aio.Server], bind: Bind) -> None:
        logging.getLogger(cygrpc.__name__).addFilter(_BLAME)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._make = make
        self._bind = bind
        self._port = 0
        self._server = make()
        self._ended: list[grpc.aio.Server] = []
        self._watching: asyncio.Task[None] | None = None

    def bind(self, port: int) -> int:
        """Take the port, 0 for a free one, and return it. RuntimeError if it can't be had."""
        self._port = self._bind(self._server, port)
        return self._port

    async def start(self) -> None:
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self, grace: float) -> None:
        """Refuse connections, and end the calls that are left after so many seconds."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await asyncio.gather(*(server.stop(grace) for server in (self._server, *self._ended)))

    async def _watch(self) -> None:
        while True:
            why = await _end_of(self._server)
            log.error("gRPC's server ended by itself (%s); listening again on port %d", why, self._port)
            self._ended.append(self._server)
            if not await self._replace():
                log.error("port %d can't be had again", self._port)
                self.lost.set_result(None)
                return

    async def _replace(self) -> bool:
        server, give_up = self._make(), time.monotonic() + _AGAIN_SECONDS
        while time.monotonic() < give_up:
            with contextlib.suppress(RuntimeError):
                self._bind(server, self._port)
                await server.start()
                self._server = server
                return True
            await asyncio.sleep(_PAUSE_SECONDS)
        return False


async def _end_of(server: grpc.aio.Server) -> str:
    """Wait for a server to end, and say why. What it was still serving may run on."""
    try:
        # Without a time it would return only when the last of its calls has ended, too.
        while await server.wait_for_termination(_LOOK_SECONDS):
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no reason given"


def make_server(options: Options) -> grpc.aio.Server:
    """A server that ends by itself for no request; give it methods with `add_registered_method_handlers` alone."""
    try:
        return cast(grpc.aio.Server, _Server(options))
    except (AttributeError, TypeError):
        log.warning(
            "this grpcio (%s) is built in another way than those that WarmKV was made for: a request with a malformed "
            "path interrupts the service for a moment",
            grpc.__version__,
        )
        return grpc.aio.server(options=options)


_OTHER = f"/other/{secrets.token_hex(16)}"


_AHEAD = 64
"""Calls of one method that are asked for at a time; of more at once the rest may be overtaken by other methods'."""


class _Core(cygrpc.AioServer):  # type: ignore[misc]
    """Never decodes a path that a client sent.

    The loop that takes calls in asks gRPC's core for the next call of each registered method, which the core tells by
    the bytes of the path, and once more for the next call of any other. The path of such a call it decodes, and one
    that is not UTF-8 ends the loop, and with it the server. So calls of other methods are asked for under a name that
    is registered, but that nobody can know; it has no handler, so that the answer is UNIMPLEMENTED, as always.

    The loop takes what has come in no order, and asks for one call of a method at a time. Here several are asked for,
    and handed to it one by one, so that calls of different methods are taken in as they came.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._asked_for: Counter[bytes] = Counter()
        self._came: deque[tuple[bytes, asyncio.Task[Any]]] = deque()
        self._expected: dict[bytes, asyncio.Future[Any]] = {}
        self._taking = False

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        expected: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if method is None:
            return expected  # nothing is taken in this way
        self._expected[method] = expected
        while self._asked_for[method] < _AHEAD:
            self._asked_for[method] += 1
            task = super()._make_request_call_future(None if method == _OTHER.encode() else method)
            task.add_done_callback(partial(self._arrived, method))
        self._taking = False
        self._hand_over()
        return expected

    def _arrived(self, method: bytes, task: asyncio.Task[Any]) -> None:
        self._asked_for[method] -= 1
        if not task.cancelled():
            task.exception()  # told to the loop, if it still asks
        self._came.append((method, task))
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the loop what came first; it asks for the method's next call once it has taken it."""
        if self._taking or not self._came or self._came[0][0] not in self._expected:
            return
        method, task = self._came.popleft()
        expected = self._expected.pop(method)
        if expected.done():
            return  # the loop has ended
        self._taking = True
        if task.cancelled():
            expected.cancel()
        elif error := task.exception():
            expected.set_exception(error)
        else:
            expected.set_result(task.result())


class _Server(Server):
    """grpc.aio's server on this core."""

    def __init__(self, options: Options) -> None:
        if not hasattr(cygrpc.AioServer, "_make_request_call_future"):
            raise AttributeError("the core takes calls in by other means")
        self._loop = asyncio.get_running_loop()
        self._server = _Core(self._loop, None, (), (), tuple(options), None)
        self._server.add_registered_method_handlers({_OTHER: None})
