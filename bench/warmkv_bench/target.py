"""The server under test: one that runs somewhere, or one that the benchmark starts and may restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from warmkv_bench.client import Client
from warmkv_bench.spawn import ServerFailed, ServerProcess

CONNECT_TIMEOUT_S = 30.0


class Target:
    """A connected server. `client` changes when the server is restarted, so don't keep it."""

    def __init__(self, client: Client, process: ServerProcess | None) -> None:
        self.client = client
        self._process = process

    @property
    def data_dir(self) -> Path | None:
        """The server's data directory, if the benchmark started it."""
        return None if self._process is None else self._process.data_dir

    @property
    def pid(self) -> int | None:
        """The server's process id, if the benchmark started it and it runs."""
        return None if self._process is None else self._process.pid

    async def restart(self) -> None:
        """Restarts the server on its data and connects again.

        Raises:
            ServerFailed: it is not the benchmark's server, or did not come back.
        """
        if self._process is None:
            raise ServerFailed("only a server that the benchmark started can be restarted")
        await self._process.restart()
        old = self.client
        self.client = await _connected(self._process.address, old.timeout_s)
        await old.__aexit__()

    def raise_if_dead(self) -> None:
        """Raises ServerFailed if the benchmark's server is no longer running."""
        if self._process is not None and self._process.pid is None:
            raise ServerFailed(f"the server died:\n{self._process.last_lines()}")


@asynccontextmanager
async def running_target(address: str, timeout_s: float) -> AsyncIterator[Target]:
    """A server at HOST:PORT; raises ServerFailed if nothing answers there."""
    target = Target(await _connected(address, timeout_s), None)
    try:
        yield target
    finally:
        await target.client.__aexit__()


@asynccontextmanager
async def spawned_target(arguments: Sequence[str], timeout_s: float) -> AsyncIterator[Target]:
    """A server started with `warmkv serve ARGUMENTS` on a temporary data directory, stopped at the end."""
    async with ServerProcess(arguments) as process:
        target = Target(await _connected(process.address, timeout_s), process)
        try:
            yield target
        finally:
            await target.client.__aexit__()


async def _connected(address: str, timeout_s: float) -> Client:
    client = await Client(address, timeout_s).__aenter__()
    try:
        await asyncio.wait_for(client.ready(), CONNECT_TIMEOUT_S)
    except TimeoutError:
        await client.__aexit__()
        raise ServerFailed(f"no server answers at {address}") from None
    return client
