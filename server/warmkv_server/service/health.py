"""grpc.health.v1.Health: whether the server serves, for whoever asks and whoever watches."""

from __future__ import annotations

import asyncio
from typing import Literal

import grpc
from grpc_health.v1 import health_pb2

from warmkv_server.service.inbound import RpcContext

ServingStatus = Literal["SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"]
"""As a HealthCheckResponse names it."""


class Health:
    """States by service, "" for the whole. Setting one waits for nobody, also not for a watcher that doesn't read."""

    def __init__(self) -> None:
        self._states: dict[str, ServingStatus] = {}
        self._changed = asyncio.Event()
        self._withdrawn = False

    def set(self, service: str, state: ServingStatus) -> None:
        """Does nothing any more once withdrawn."""
        if not self._withdrawn:
            self._states[service] = state
            self._wake()

    def withdraw(self) -> None:
        """Say NOT_SERVING of everything, for good."""
        self._withdrawn = True
        self._states = dict.fromkeys(self._states, "NOT_SERVING")
        self._wake()

    @property
    def serves(self) -> bool:
        """Whether it is SERVING as a whole."""
        return self._states.get("") == "SERVING"

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: RpcContext
    ) -> health_pb2.HealthCheckResponse | None:
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the server has no such service")
            return None
        return health_pb2.HealthCheckResponse(status=state)

    async def watch(self, request: health_pb2.HealthCheckRequest, context: RpcContext) -> None:
        """The state, and each that is different from the one told last; ends with the call."""
        told: ServingStatus | None = None
        while True:
            changed = self._changed
            state: ServingStatus = self._states.get(request.service, "SERVICE_UNKNOWN")
            if state != told:
                await context.write(health_pb2.HealthCheckResponse(status=state))
                told = state
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
