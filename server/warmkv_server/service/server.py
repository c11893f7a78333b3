"""The gRPC server: its sockets, its services, health and reflection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from warmkv.v1 import agent_service_pb2, server_service_pb2
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import OperatorError
from warmkv_server.service import inbound
from warmkv_server.service.agent_servicer import AgentServicer
from warmkv_server.service.endpoint import Endpoints
from warmkv_server.service.health import Health
from warmkv_server.service.listener import Listener, Options, make_server
from warmkv_server.service.open_services import Handlers, gateway_health, health_methods, reflection_methods
from warmkv_server.service.server_servicer import ServerServicer
from warmkv_server.service.tls import Certificate

_AGENTS = agent_service_pb2.DESCRIPTOR.services_by_name["AgentService"]
_SERVER = server_service_pb2.DESCRIPTOR.services_by_name["ServerService"]
_SERVICES = ("", _AGENTS.full_name, _SERVER.full_name)
_STORAGE = "warmkv.v1.storage"
"""No service, but a state to watch: whether what is committed is on disk. Calls are served either way."""

_RECEIVE_FACTOR = 2
"""gRPC itself cuts off requests larger than so many times the limit, and says less about why than we do."""

_PING_MILLISECONDS = 500
"""Clients may ask so often whether the connection lives, though nothing is said and no call is open: those that wait
for an answer for minutes must be able to tell a slow server from a dead one, and proxies drop what is silent. Twice a
second, so that who asks every second is never early."""
_HANDSHAKE_MILLISECONDS = 20_000
_IDLE_MILLISECONDS = 600_000
"""After so long without a call a connection is closed: there are only so many, and clients make a new one unasked."""
_STREAMS = 1024
"""Calls at once on one connection; clients let further ones wait."""

_PROBES = 16
"""Connections at once to the port for health; out of the store's reserve of descriptors."""

_GATEWAYS = 64
"""Connections at once to the port for gateways, which send all requests over few; out of the store's reserve, too."""

_LEFT_SECONDS = 1.0


def _options(message_bytes: int, connections: int) -> Options:
    return (
        # A second server on the port must fail, not take every other connection.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", message_bytes * _RECEIVE_FACTOR),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_MILLISECONDS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_idle_ms", _IDLE_MILLISECONDS),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MILLISECONDS),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.max_allowed_incoming_connections", connections),
        *inbound.OPTIONS,
    )


@dataclass(frozen=True)
class GatewayService:
    """What a gateway speaks, on a port of its own.

    Attributes:
        servicer: has a method for each RPC, but for HealthCheck.
        endpoints: know whose agents it serves.
    """

    service: ServiceDescriptor
    servicer: object
    endpoints: Endpoints

    def methods(self, health: Health) -> dict[str, Handlers]:
        own = self.endpoints.handlers(self.service, self.servicer, leave_out=("HealthCheck",))
        checked = gateway_health(self.service, health)
        return {self.service.full_name: own | checked}


class GrpcServer:
    """Serves from `start` on; says NOT_SERVING until `announce`.

    Args:
        connections: most of them at once; further ones are closed as they come.
        certificate: for TLS; None to serve without.
        gateway: what is served on the port for a gateway, if there is to be one.

    Attributes:
        lost: done if it serves no more, though nobody has stopped it.
    """

    def __init__(
        self,
        settings: Settings,
        endpoints: Endpoints,
        agents: AgentServicer,
        server: ServerServicer,
        connections: int,
        certificate: Certificate | None,
        gateway: GatewayService | None = None,
    ) -> None:
        self._settings = settings
        self._announced, self._computing = False, True
        self._health = Health()
        methods = {
            _AGENTS.full_name: endpoints.handlers(_AGENTS, agents),
            _SERVER.full_name: endpoints.handlers(_SERVER, server),
            **health_methods(self._health),
            **reflection_methods((_AGENTS, _SERVER)),
        }
        self._certificate = certificate
        self._gateway = gateway
        self._listener = Listener(partial(self._make, methods, connections), self._bind)
        self._others: list[Listener] = []
        self.lost = self._listener.lost

    def bind(self) -> int:
        """Take the port, and those for health alone and for a gateway, if there are to be some. Returns the first.

        Raises:
            OperatorError: if one can't be had.
        """
        host = self._settings.host
        taken = _take(self._listener, host, self._settings.port, "--port")
        if self._settings.health_port is not None:
            probed = Listener(partial(self._make, health_methods(self._health), _PROBES), self._bind)
            _take(probed, host, self._settings.health_port, "--health-port")
            self._others.append(probed)
        if self._gateway is not None and self._settings.gateway_port is not None:
            served = Listener(partial(self._make, self._gateway.methods(self._health), _GATEWAYS), self._bind_gateway)
            _take(served, self._settings.gateway_host, self._settings.gateway_port, "--gateway-port")
            self._others.append(served)
        return taken

    async def start(self) -> None:
        for service in (*_SERVICES, _STORAGE):
            self._health.set(service, "NOT_SERVING")
        for listener in self._listeners:
            await listener.start()

    def announce(self) -> None:
        """Say SERVING, as long as the engine computes."""
        self._announced = True
        self._say_serving()

    def say_storage(self, taking: bool) -> None:
        """Say SERVING of the storage if the disk has all that is committed, else NOT_SERVING."""
        self._health.set(_STORAGE, "SERVING" if taking else "NOT_SERVING")

    def say_engine(self, running: bool) -> None:
        """Say SERVING if the engine computes, else NOT_SERVING; before `announce` it is NOT_SERVING either way."""
        self._computing = running
        self._say_serving()

    def _say_serving(self) -> None:
        for service in _SERVICES:
            self._health.set(service, "SERVING" if self._announced and self._computing else "NOT_SERVING")

    def withdraw(self) -> None:
        """Say NOT_SERVING, for good."""
        self._health.withdraw()

    async def stop(self, grace: float) -> None:
        """Refuse connections, and end the calls that are left after so many seconds. Nothing else runs any more."""
        await asyncio.gather(*(listener.stop(grace) for listener in self._listeners))
        # gRPC returns a moment before its handlers do; a loop that ends in between logs their tracebacks.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=_LEFT_SECONDS)

    @property
    def _listeners(self) -> list[Listener]:
        return [self._listener, *self._others]

    def _make(self, services: Mapping[str, Handlers], connections: int) -> grpc.aio.Server:
        server = make_server(_options(self._settings.max_message_bytes, connections))
        for service, methods in services.items():
            server.add_registered_method_handlers(service, methods)
        return server

    def _bind_gateway(self, server: grpc.aio.Server, port: int) -> int:
        return server.add_insecure_port(_address(self._settings.gateway_host, port))

    def _bind(self, server: grpc.aio.Server, port: int) -> int:
        address = _address(self._settings.host, port)
        if self._certificate is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._certificate.credentials())


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _take(listener: Listener, host: str, port: int, flag: str) -> int:
    """Have it listen; returns the port."""
    _probe(host, port, flag)
    try:
        return listener.bind(port)
    except RuntimeError as error:
        raise OperatorError(f"can't listen on {host}:{port}: {error}") from error


def _probe(host: str, port: int, flag: str) -> None:
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
                f"can't listen on {host}:{port} ({error.strerror}); choose another {flag}"
                + (", or --port 0 for a free one" if flag == "--port" else "")
            ) from error
