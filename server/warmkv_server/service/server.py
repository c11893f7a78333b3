"""The gRPC server: its sockets, its services, health and reflection."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from warmkv.v1 import agent_service_pb2, server_service_pb2
from warmkv_server.errors import OperatorError
from warmkv_server.service.agent_servicer import AgentServicer
from warmkv_server.service.endpoint import Context, Endpoints
from warmkv_server.service.server_servicer import ServerServicer

_AGENTS = agent_service_pb2.DESCRIPTOR.services_by_name["AgentService"]
_SERVER = server_service_pb2.DESCRIPTOR.services_by_name["ServerService"]
_SERVICES = ("", _AGENTS.full_name, _SERVER.full_name)
_STORAGE = "warmkv.v1.storage"
"""No service, but a state to watch: whether what is committed is on disk. Calls are served either way."""
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

_RECEIVE_FACTOR = 8
"""gRPC itself cuts off requests larger than so many times the limit, and says less about why than we do."""

_LEFT_SECONDS = 1.0


@dataclass(frozen=True)
class Tls:
    """Files in PEM form."""

    certificate: Path
    key: Path


class GrpcServer:
    """Serves from `start` on; says NOT_SERVING until `announce`."""

    def __init__(self, endpoints: Endpoints, agents: AgentServicer, server: ServerServicer) -> None:
        self._server = grpc.aio.server(
            options=[
                # A second server on the port must fail, not take every other connection.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", endpoints.message_bytes * _RECEIVE_FACTOR),
                ("grpc.max_send_message_length", -1),
            ]
        )
        self._health = health.aio.HealthServicer()
        self._saying: set[asyncio.Task[None]] = set()
        self._server.add_generic_rpc_handlers(
            (endpoints.handlers(_AGENTS, agents), endpoints.handlers(_SERVER, server), *_reflection())
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def bind(self, host: str, port: int, tls: Tls | None) -> int:
        """Take the port, 0 for a free one, and return it.

        Raises:
            OperatorError: if it can't be had, or the certificate is not good.
        """
        _probe(host, port)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, _credentials(tls))
        except RuntimeError as error:
            raise OperatorError(f"can't listen on {host}:{port}: {error}") from error

    async def start(self) -> None:
        for service in (*_SERVICES, _STORAGE):
            await self._health.set(service, _NOT_SERVING)
        await self._server.start()

    async def announce(self) -> None:
        """Say SERVING."""
        for service in _SERVICES:
            await self._health.set(service, _SERVING)

    def say_storage(self, taking: bool) -> None:
        """Say SERVING of the storage if the disk has all that is committed, else NOT_SERVING."""
        self._say(taking, _STORAGE)

    def say_engine(self, running: bool) -> None:
        """Say SERVING if the engine computes, else NOT_SERVING."""
        self._say(running, *_SERVICES)

    def _say(self, serving: bool, *services: str) -> None:
        for service in services:
            saying = asyncio.create_task(self._health.set(service, _SERVING if serving else _NOT_SERVING))
            self._saying.add(saying)
            saying.add_done_callback(self._saying.discard)

    async def withdraw(self) -> None:
        """Say NOT_SERVING, for good."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Refuse connections, and end the calls that are left after so many seconds. Nothing else runs any more."""
        await self._server.stop(grace)
        # gRPC returns a moment before its handlers do; a loop that ends in between logs their tracebacks.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=_LEFT_SECONDS)


def _reflection() -> list[grpc.GenericRpcHandler]:
    """Server reflection v1alpha, and v1, whose messages are the same on the wire."""
    names = (_AGENTS.full_name, _SERVER.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names)

    async def tell(
        requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: Context
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        answers: Any = servicer.ServerReflectionInfo(_by_service(requests), context)
        async for answer in answers:
            yield answer

    handler = grpc.stream_stream_rpc_method_handler(
        tell,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return [
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
        for name in (reflection.SERVICE_NAME, _REFLECTION_V1)
    ]


async def _by_service(
    requests: AsyncIterator[reflection_pb2.ServerReflectionRequest],
) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    """Ask for a method's service instead of the method: protobuf's pool finds no file by a method's name."""
    methods = {method.full_name: service.full_name for service in (_AGENTS, _SERVER) for method in service.methods}
    async for request in requests:
        if request.file_containing_symbol in methods:
            request.file_containing_symbol = methods[request.file_containing_symbol]
        yield request


def _probe(host: str, port: int) -> None:
    """Find out why a port can't be had: gRPC says only that it can't."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OperatorError(f"{host!r} is no address to listen on: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OperatorError(
                f"can't listen on {host}:{port} ({error.strerror}); choose another --port, or --port 0 for a free one"
            ) from error


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key)
        pair = tls.key.read_bytes(), tls.certificate.read_bytes()
    except (OSError, ssl.SSLError) as error:
        raise OperatorError(
            f"the TLS certificate {tls.certificate} and key {tls.key} can't be used: {error.strerror or error}"
        ) from error
    return grpc.ssl_server_credentials([pair])
