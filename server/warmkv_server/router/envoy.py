"""Envoy's configuration for a fleet: maglev on the agent, health, retries that are safe, gRPC-Web and JSON.

Nothing of ours routes. What Envoy is told, and why, stands in envoy.yaml.j2 beside this.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import error_details_pb2
from jinja2 import Environment, StrictUndefined

from warmkv import ROUTING_KEY
from warmkv.v1 import agent_service_pb2, server_service_pb2
from warmkv_server.errors import OperatorError

_HEALTH_SECONDS = 1
"""How often each server is asked for its health."""

_SERVICES = (
    agent_service_pb2.DESCRIPTOR.services_by_name["AgentService"],
    server_service_pb2.DESCRIPTOR.services_by_name["ServerService"],
)
_BUFFER_BYTES = 32 << 20
"""The largest request and response that is held as a whole; above twice the server's own default limit, so that the
server is who refuses."""
_TEMPLATE = Path(__file__).with_name("envoy.yaml.j2")
_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^\[\]:/@=\s]+)):(?P<port>\d{1,5})")
_LARGEST_PORT = 65535


@dataclass(frozen=True)
class Address:
    """Where something listens."""

    host: str
    port: int

    @classmethod
    def read(cls, text: str) -> Address:
        """
        Args:
            text: HOST:PORT, or [HOST]:PORT.

        Raises:
            OperatorError
        """
        found = _ADDRESS.fullmatch(text)
        if found is None or not 0 < int(found["port"]) <= _LARGEST_PORT:
            raise OperatorError(f"{text!r} is no address: give HOST:PORT, such as 10.0.0.4:50051 or [::1]:50051")
        return cls(found["six"] or found["host"], int(found["port"]))

    @property
    def is_number(self) -> bool:
        """Whether the host is an IP address, and nobody has to be asked for it."""
        try:
            ip_address(self.host)
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class Member:
    """A server of the fleet.

    Attributes:
        name: what agents are assigned by; a server that keeps it keeps its agents, whatever its address becomes.
        draining: agents are led elsewhere; what is at work ends.
    """

    name: str
    address: Address
    draining: bool = False

    @classmethod
    def read(cls, text: str) -> Member:
        """
        Args:
            text: [NAME=]HOST:PORT.

        Raises:
            OperatorError
        """
        name, is_named, address = text.rpartition("=")
        if is_named and not name:
            raise OperatorError(f"{text!r} has no name before the '='; give NAME=HOST:PORT, or HOST:PORT alone")
        return cls(name or address, Address.read(address))


@dataclass(frozen=True)
class PemFiles:
    """Files in PEM form, as Envoy sees them."""

    chain: Path
    key: Path


@dataclass(frozen=True)
class Router:
    """What Envoy is to do.

    Attributes:
        listen: where clients come.
        admin: where Envoy answers its operator; None for nowhere.
        tls: for clients; None to let them in without.
        upstream_ca: certificates that the servers' own are checked against; None where the servers have none.
    """

    members: Sequence[Member]
    listen: Address
    admin: Address | None = None
    tls: PemFiles | None = None
    upstream_ca: Path | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            OperatorError: there is no server, or one name twice.
        """
        names = [member.name for member in self.members]
        if not names:
            raise OperatorError("a fleet needs servers: name each with --server [NAME=]HOST:PORT")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise OperatorError(f"two servers are called {twice[0]}; give each a name of its own")

    def write(self, folder: Path) -> list[Path]:
        """Write the whole configuration, for an Envoy that runs already too: each file is replaced at once, and Envoy
        reads the list of servers again when it is.

        Raises:
            OperatorError: the folder can't be written.
        """
        folder = folder.absolute()
        descriptors, endpoints = folder / "warmkv.pb", folder / "endpoints.yaml"
        has_list = all(member.address.is_number for member in self.members)
        files = {
            descriptors: _descriptors().SerializeToString(),
            folder / "envoy.yaml": self._configuration(folder, descriptors, endpoints if has_list else None).encode(),
        }
        if has_list:
            files[endpoints] = _list_of(self._assignment()).encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, content in files.items():
                _replace(path, content)
        except OSError as error:
            raise OperatorError(f"{folder} can't be written: {error.strerror}") from error
        return list(files)

    def _configuration(self, folder: Path, descriptors: Path, endpoints: Path | None) -> str:
        jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
        return jinja.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
            folder=str(folder),
            listen=self.listen,
            admin=self.admin,
            tls={"chain": str(self.tls.chain), "key": str(self.tls.key)} if self.tls is not None else None,
            upstream_ca=str(self.upstream_ca) if self.upstream_ca is not None else None,
            routing_key=ROUTING_KEY,
            descriptors=str(descriptors),
            endpoints=str(endpoints) if endpoints is not None else None,
            assignment=self._assignment(),
            services=[service.full_name for service in _SERVICES],
            agent_fields=dict(_agent_fields()),
            buffer_bytes=_BUFFER_BYTES,
            health_seconds=_HEALTH_SECONDS,
        ) + "\n"  # fmt: skip

    def _assignment(self) -> dict[str, Any]:
        """The servers, as Envoy's ClusterLoadAssignment."""
        return {
            "cluster_name": "warmkv",
            "endpoints": [
                {
                    "lb_endpoints": [
                        {
                            "endpoint": {
                                "hostname": member.address.host,
                                "address": {
                                    "socket_address": {
                                        "address": member.address.host,
                                        "port_value": member.address.port,
                                    }
                                },
                            },
                            "health_status": "DRAINING" if member.draining else "UNKNOWN",
                            "metadata": {"filter_metadata": {"envoy.lb": {"hash_key": member.name}}},
                        }
                        for member in self.members
                    ]
                }
            ],
        }


def _agent_fields() -> Iterator[tuple[str, str]]:
    """Where the request of each method has its agent: the method, and the field's path."""
    for service in _SERVICES:
        for method in service.methods:
            if path := _agent_field(method.input_type):
                yield f"{service.full_name}.{method.name}", path


def _agent_field(request: Descriptor) -> str:
    if "agent_id" in request.fields_by_name:
        return "agent_id"
    return "agent.agent_id" if "agent" in request.fields_by_name else ""


def _descriptors() -> FileDescriptorSet:
    """Our services with all that they use, and the details of errors, without which JSON clients get none."""
    found = FileDescriptorSet()
    seen: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in seen:
            return
        seen.add(file.name)
        for needed in file.dependencies:
            add(needed)
        file.CopyToProto(found.file.add())

    for service in _SERVICES:
        add(service.file)
    add(error_details_pb2.DESCRIPTOR)
    return found


def _list_of(assignment: dict[str, Any]) -> str:
    kind = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
    resource = json.dumps({"@type": kind, **assignment}, indent=2)
    return f'# The servers; written by `warmkv fleet envoy`.\n{{"resources": [{resource}]}}\n'


def _replace(path: Path, content: bytes) -> None:
    """Envoy looks out for files that are moved to where it reads."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
