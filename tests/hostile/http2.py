"""Frames of HTTP/2 made by hand, right and wrong ones, and a connection to send them over."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACKNOWLEDGED = 1, 4, 1
ALL_OF_IT = END_STREAM | END_HEADERS
CHECK = b"/grpc.health.v1.Health/Check"
INFO = b"/warmkv.v1.ServerService/GetServerInfo"
PATIENCE = 30.0
_ASKED = b"heard it"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A frame; `length` is a lie about the payload."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """A header field, spelled out, not to be remembered."""
    return b"\x00" + _string(name) + _string(value)


def fields(*replaced: tuple[bytes, bytes | None], path: bytes = INFO) -> bytes:
    """The header of a call; None leaves a field out, and fields of other names are added."""
    usual = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"warmkv",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    merged: dict[bytes, bytes | None] = {**usual, **dict(replaced)}
    return b"".join(field(name, value) for name, value in merged.items() if value is not None)


def message(data: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """A gRPC message, as DATA frames hold it; `length` is a lie about the data."""
    return struct.pack(">BI", flag, len(data) if length is None else length) + data


def call(
    *replaced: tuple[bytes, bytes | None], path: bytes = INFO, body: bytes = message(b""), stream: int = 1
) -> bytes:
    """A whole call of one message."""
    opened = frame(HEADERS, END_HEADERS, stream, fields(*replaced, path=path))
    return opened + frame(DATA, END_STREAM, stream, body)


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


class Connection:
    """What is sent over it is the caller's affair, but for the preface of an honest beginning."""

    def __init__(self, taken: socket.socket) -> None:
        self._socket = taken

    def begin(self) -> None:
        """As honest clients do; the server's windows are open from here on."""
        self.send(PREFACE + settings())
        self.heard()
        self.send(frame(SETTINGS, ACKNOWLEDGED, 0))

    def send(self, data: bytes) -> None:
        """Send; a server that has closed the connection already has made up its mind."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            self._socket.sendall(data)

    def heard(self) -> bytes:
        """Wait until the server has read what was sent, or has closed the connection; return what it has said."""
        self.send(frame(PING, 0, 0, _ASKED))
        return self._until(_ASKED)

    def answer(self) -> bytes:
        """Wait until the server has ended a call, or has closed the connection; return what it has said."""
        return self._until(b"grpc-status")

    def _until(self, words: bytes) -> bytes:
        said = bytearray()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while words not in said and (part := self._socket.recv(1 << 16)):
                said += part
        return bytes(said)


@contextmanager
def connection(address: str, certificate: Path | None = None, patience: float = PATIENCE) -> Iterator[Connection]:
    """Args:
    patience: seconds that the server may be silent.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), patience) as plain:
        if certificate is None:
            yield Connection(plain)
            return
        context = ssl.create_default_context(cafile=str(certificate))
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(plain, server_hostname=host) as wrapped:
            yield Connection(wrapped)


def _string(text: bytes) -> bytes:
    """Its length, in a number that begins with seven bits, and its bytes."""
    length = len(text)
    if length < 127:
        return bytes([length]) + text
    number, length = bytearray([127]), length - 127
    while length > 127:
        number.append(length & 127 | 128)
        length >>= 7
    return bytes(number) + bytes([length]) + text
