"""How a channel to a server is made: security, keepalive, and what is tried again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from warmkv import ROUTING_KEY, agent_of

Metadata = tuple[tuple[str, str], ...]

_AGENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [
        {
            "name": [{"service": "warmkv.v1.AgentService"}, {"service": "warmkv.v1.ServerService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
"""gRPC's service config: what a call does by itself when the server can't be reached, loads or drains. With it requests
that change something need a request_id, for a connection can break when the work is done; the clients here give one."""

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", -1),
    # A long prefill says nothing for minutes; pings tell a slow server from a dead one, and proxies that it is used.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted server is to be found soon, not after a back-off that grew while it was away.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def routed(metadata: Metadata, request: Any) -> Metadata:
    """A call's metadata, with the agent that the request is about, if it is about one. What is no agent_id is left to
    the server to refuse: metadata can't have it."""
    agent_id = agent_of(request) or ""
    return (*metadata, (ROUTING_KEY, agent_id)) if _AGENT_ID.fullmatch(agent_id) else metadata


@dataclass(frozen=True)
class Target:
    """Where a server is, and how it is spoken to.

    Attributes:
        address: HOST:PORT, or another name that gRPC resolves.
        token: of the server's token file.
        tls: with the roots that gRPC brings.
        tls_ca: with these roots, a file in PEM form.
        options: of gRPC's channel; they win over ours.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    tls: bool = False
    tls_ca: str | Path | None = None
    options: Sequence[tuple[str, Any]] = ()

    @property
    def metadata(self) -> Metadata:
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def channel(self) -> grpc.Channel:
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, self._options())
        return grpc.secure_channel(self.address, credentials, self._options())

    def async_channel(self) -> grpc.aio.Channel:
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, self._options())
        return grpc.aio.secure_channel(self.address, credentials, self._options())

    def _options(self) -> list[tuple[str, Any]]:
        return [*self.options, *OPTIONS]  # of two of one name gRPC takes the first

    def _credentials(self) -> grpc.ChannelCredentials | None:
        """
        Raises:
            OSError: the file of roots can't be read.
        """
        if self.tls_ca is not None:
            return grpc.ssl_channel_credentials(Path(self.tls_ca).read_bytes())
        return grpc.ssl_channel_credentials() if self.tls else None
