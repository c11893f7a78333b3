"""Malformed HTTP/2 of many kinds, from somebody without a token: the server goes on, and its log stays clean."""

from __future__ import annotations

import gzip
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import Client, Server, text
from tests.hostile import http2
from tests.hostile.http2 import ALL_OF_IT, CHECK, END_HEADERS, INFO, call, fields, frame, message, settings

TLS = Path(__file__).parents[1] / "e2e" / "tls"
WATCH = b"/grpc.health.v1.Health/Watch"
REFLECT = b"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
PRIME = b"/warmkv.v1.AgentService/Prime"


def opened(block: bytes, flags: int = ALL_OF_IT, stream: int = 1) -> bytes:
    return frame(http2.HEADERS, flags, stream, block)


def in_pieces(block: bytes) -> bytes:
    """A header that needs more than one frame."""
    pieces = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
    first = frame(http2.HEADERS, http2.END_STREAM, 1, pieces[0])
    middle = [frame(http2.CONTINUATION, 0, 1, piece) for piece in pieces[1:-1]]
    return first + b"".join(middle) + frame(http2.CONTINUATION, END_HEADERS, 1, pieces[-1])


KINDS: dict[str, bytes] = {
    "a path that is not UTF-8": call(path=b"/\xff"),
    "a path that is not UTF-8 of a service that is there": call(path=INFO + b"\xc3\x28"),
    "a path that is not UTF-8, without a message": opened(fields(path=b"/\xed\xa0\x80")),
    "many paths that are not UTF-8": b"".join(call(path=b"/\xfe%d" % n, stream=2 * n + 1) for n in range(50)),
    "no path": call((b":path", None)),
    "an empty path": call(path=b""),
    "a path without a slash": call(path=b"warmkv"),
    "a path with controls": call(path=b"/a\x00b\r\nc"),
    "a path of 100 KB": in_pieces(fields(path=b"/" + b"x" * 100_000)),
    "two paths": opened(fields() + http2.field(b":path", b"/\xff")),
    "a method that is not there": call(path=b"/warmkv.v1.AgentService/Nothing"),
    "an authority that is not UTF-8": call((b":authority", b"\xff")),
    "metadata that is not UTF-8": call((b"authorization", b"Bearer \xff"), (b"x-a", b"\xfe\xff")),
    "metadata with a name in capitals": call((b"X-Loud", b"1")),
    "metadata with a name that is none": call((b"x y\xff", b"1")),
    "binary metadata that is not base64": call((b"x-bin", b"****")),
    "metadata of 200 KB": in_pieces(fields((b"x-large", b"x" * 200_000))),
    "a thousand pieces of a header": frame(http2.HEADERS, 0, 1) + frame(http2.CONTINUATION, 0, 1) * 1000,
    "a time that is none": call((b"grpc-timeout", b"99999999999H")),
    "a time that is over": call((b"grpc-timeout", b"1n")),
    "GET": call((b":method", b"GET")),
    "another type of content": call((b"content-type", b"text/\xff")),
    "an unknown compression": call((b"grpc-encoding", b"\xff"), body=message(b"x", flag=1)),
    "a compression that is not offered": call((b"grpc-encoding", b"deflate"), body=message(b"x", flag=1)),
    "gzip that is none": call((b"grpc-encoding", b"gzip"), path=CHECK, body=message(b"\x1f\x8bno", flag=1)),
    "gzip without its end": call(
        (b"grpc-encoding", b"gzip"), path=CHECK, body=message(gzip.compress(b"x")[:-9], flag=1)
    ),
    "gzip that inflates to much": call(
        (b"grpc-encoding", b"gzip"), path=CHECK, body=message(gzip.compress(b"\n" * 3_000_000), flag=1)
    ),
    "a message flagged as what there is not": call(path=CHECK, body=message(b"", flag=0xFF)),
    "a message that is none": call(path=CHECK, body=message(b"\xff\xff\xff")),
    "a question to reflection that is none": call(path=REFLECT, body=message(b"\xff\xff\xff")),
    "a question to reflection about what is not UTF-8": call(path=REFLECT, body=message(b"\x22\x02\xff\xfe")),
    "no message": opened(fields(path=CHECK)),
    "two messages": call(path=CHECK, body=message(b"") * 2),
    "a message said to have 4 GB": call(path=CHECK, body=message(b"x", length=0xFFFFFFFF)),
    "a message with a part missing": call(path=PRIME, body=message(b"x" * 10, length=1000)),
    "calls that never send their message": b"".join(
        opened(fields(path=PRIME), END_HEADERS, 2 * n + 1) for n in range(200)
    ),
    "calls that are reset at once": b"".join(
        call(path=CHECK, stream=2 * n + 1) + frame(http2.RST_STREAM, 0, 2 * n + 1, struct.pack(">I", 8))
        for n in range(500)
    ),
    "watchers that never take an answer": settings((4, 0))
    + b"".join(call(path=WATCH, stream=2 * n + 1) for n in range(50)),
    "a stream of the server's": opened(fields(), stream=2),
    "a stream opened twice": opened(fields()) * 2,
    "stream 0": opened(fields(), stream=0),
    "data on stream 0": frame(http2.DATA, 0, 0, b"x"),
    "data before a header": frame(http2.DATA, 0, 1, message(b"")),
    "the end of a stream that was never there": frame(http2.RST_STREAM, 0, 99, struct.pack(">I", 1)),
    "the rest of a header that was never there": frame(http2.CONTINUATION, END_HEADERS, 1, fields()),
    "a promise": frame(http2.PUSH_PROMISE, END_HEADERS, 1, struct.pack(">I", 2) + fields()),
    "a stream that depends on itself": frame(http2.PRIORITY, 0, 1, struct.pack(">IB", 1, 255)),
    "a window that opens by nothing": frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 0)),
    "a window that opens too far": frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 0x7FFFFFFF)) * 2,
    "settings of a wrong size": frame(http2.SETTINGS, 0, 0, b"\x00" * 5),
    "settings beyond their bounds": settings((4, 0xFFFFFFFF), (5, 1), (2, 7)),
    "two thousand settings": settings((3, 1)) * 2000,
    "two thousand pings": frame(http2.PING, 0, 0, b"12345678") * 2000,
    "a ping of a wrong size": frame(http2.PING, 0, 0, b"123"),
    "a farewell": frame(http2.GOAWAY, 0, 0, struct.pack(">II", 0, 0)) + call(),
    "a frame of no known kind": frame(0xEE, 0xFF, 1, b"x" * 100),
    "a frame longer than allowed": frame(http2.DATA, 0, 1, b"x" * 100, length=0xFFFFFF),
    "a header field of no known number": opened(b"\xff\xff\xff\xff\x0f"),
    "a header field in no known letters": opened(b"\x00\x85\xff\xff\xff\xff\xff\x81\xff"),
    "a header field that ends early": opened(b"\x00\x7f"),
    "a table of headers beyond its bounds": opened(b"\x3f\xe1\xff\xff\x7f" + fields()),
}

NOT_HTTP2: dict[str, bytes] = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: warmkv\r\n\r\n",
    "noise": random.Random(20).randbytes(10_000),
    "nothing": b"",
    "half of the preface": http2.PREFACE[:12],
    "the preface and no settings": http2.PREFACE + call(path=b"/\xff"),
}


@dataclass
class Target:
    """A server, what to trust, and who may call it."""

    server: Server
    certificate: Path | None
    token: str | None

    def serves(self) -> None:
        """On a new connection: health, and who has a token."""
        trusted = None if self.certificate is None else grpc.ssl_channel_credentials(self.certificate.read_bytes())
        with Client(self.server.address, token=self.token, credentials=trusted) as client:
            assert client.health_of() == "SERVING"
            assert client.count(text("Hello")).token_count > 0
        assert "Traceback" not in self.server.log_text()


@pytest.fixture(scope="module", params=["open", "TLS and tokens"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("http2")
    certificate, token, flags = None, None, list[str]()
    if request.param != "open":
        certificate, token, tokens = TLS / "certificate.pem", "a-token", folder / "tokens"
        tokens.write_text(f"red {token}\n")
        flags = ["--tls-cert", str(certificate), "--tls-key", str(TLS / "key.pem"), "--token-file", str(tokens)]
    server = Server(folder / "data", *flags)
    yield Target(server, certificate, token)
    assert server.terminate() == 0
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_frames(target: Target, kind: str) -> None:
    with http2.connection(target.server.address, target.certificate) as attack:
        attack.begin()
        attack.send(KINDS[kind])
        attack.heard()
    target.serves()


@pytest.mark.parametrize("kind", NOT_HTTP2)
def test_what_is_not_http2(target: Target, kind: str) -> None:
    with http2.connection(target.server.address, target.certificate) as attack:
        attack.send(NOT_HTTP2[kind])
    target.serves()


def test_a_header_with_bytes_changed_at_random(target: Target) -> None:
    """A seed of its own in every run; what it was is in the name of a variable that pytest shows."""
    seed = int.from_bytes(os.urandom(4))
    chance = random.Random(seed)
    for _ in range(40):
        with http2.connection(target.server.address, target.certificate) as attack:
            attack.begin()
            for stream in range(1, 40, 2):
                block = bytearray(fields(path=chance.choice([INFO, CHECK, PRIME, WATCH])))
                for _ in range(chance.randrange(1, 4)):
                    block[chance.randrange(len(block))] = chance.randrange(256)
                attack.send(opened(bytes(block), END_HEADERS, stream))
                attack.send(frame(http2.DATA, http2.END_STREAM, stream, message(chance.randbytes(5))))
            attack.heard()
    target.serves()
