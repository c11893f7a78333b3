"""The certificate that connections are made with, and a newer one for those that come after it was replaced."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from warmkv_server.contract.settings import Settings
from warmkv_server.errors import OperatorError
from warmkv_server.service.auth import warn_if_open

Configuration = grpc.ServerCertificateConfiguration


class Certificate:
    """A chain and its key, from files in PEM form.

    Args:
        chain, key: the files.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        """
        Raises:
            OperatorError: they can't be read, are no certificate and key, or don't belong together.
        """
        self._chain, self._key = chain, key
        self._now = _read(chain, key)

    @classmethod
    def of(cls, settings: Settings) -> Certificate | None:
        """The one that the operator named, if any.

        Raises:
            OperatorError
        """
        chain, key = settings.tls_cert, settings.tls_key
        return cls(chain, key) if chain is not None and key is not None else None

    def reload(self) -> str:
        """Read the files again, and name them. Connections that there are go on; new ones get what the files have now.

        Raises:
            OperatorError: as the constructor; the certificate stays what it was.
        """
        self._now = _read(self._chain, self._key)
        return f"the TLS certificate {self._chain} and key {self._key}"

    def credentials(self) -> grpc.ServerCredentials:
        """For one port."""
        told = self._now

        def newer() -> Configuration | None:
            # Asked for every connection, on a thread of gRPC's; None for what it was told last.
            nonlocal told
            now = self._now
            if now is told:
                return None
            told = now
            return now

        return grpc.dynamic_ssl_server_credentials(told, newer)  # type: ignore[arg-type]  # the stub knows no None


def _read(chain: Path, key: Path) -> Configuration:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key)
        pair = key.read_bytes(), chain.read_bytes()
    except (OSError, ssl.SSLError) as error:
        raise OperatorError(
            f"the TLS certificate {chain} and key {key} can't be used: {error.strerror or error}"
        ) from error
    warn_if_open(key, "the TLS key")
    return grpc.ssl_server_certificate_configuration([pair])
