"""SIGHUP: tokens and certificates are read again, and nothing that runs notices."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import Client, Server, refused, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that

UNKNOWN = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
STREAMS = 20


def hang_up(server: Server, said: str) -> None:
    """Have it read its files again, and wait until the log has said so once more."""
    before = server.log_text().count(said)
    server.signal(signal.SIGHUP)
    await_that(lambda: server.log_text().count(said) > before)


def test_new_tokens_while_streams_run(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("red old-token\n")
    begun = threading.Semaphore(0)
    replaced = threading.Event()

    def stream(address: str, number: int) -> int:
        """Tokens that one answer has, most of them from after the change."""
        with Client(address, token="old-token") as client:
            content = token_ids(some_tokens(20, number))
            count = 0
            for event in client.stream(f"a{number}", content, max_tokens=60, ignore_eos=True):
                if event.HasField("delta"):
                    count += len(event.delta.token_ids)
                    begun.release()
                    assert replaced.wait(120)
            return count

    flags = ["--token-file", str(tokens), "--max-batch", str(STREAMS)]
    with serving(tmp_path / "data", *flags) as (server, _), ThreadPoolExecutor(STREAMS) as pool:
        answers = [pool.submit(stream, server.address, number) for number in range(STREAMS)]
        for _ in range(STREAMS):
            assert begun.acquire(timeout=120)
        tokens.write_text("red new-token\nblue blue-token\n")
        hang_up(server, "read again the token file")
        replaced.set()
        assert [answer.result() for answer in answers] == [60] * STREAMS
        with Client(server.address, token="old-token") as old, refused(*UNKNOWN):
            old.list()
        with Client(server.address, token="new-token") as new, Client(server.address, token="blue-token") as blue:
            assert len(new.list().agents) == STREAMS
            assert not blue.list().agents

            tokens.write_text("red\n")
            hang_up(server, "SIGHUP changed nothing: line 1 of the token file")
            assert len(new.list().agents) == STREAMS


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Where a certificate and its key are put."""
    return tmp_path / "certificate.pem", tmp_path / "key.pem"


def put_certificate(pair: tuple[Path, Path], number: int) -> None:
    certificate, key = pair
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-set_serial", str(number)]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)


def serial(address: str) -> int:
    """That of the certificate which a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 60) as plain, context.wrap_socket(plain) as encrypted:
        shown = encrypted.getpeercert(binary_form=True)
    assert shown is not None
    text = subprocess.run(["openssl", "x509", "-inform", "DER", "-noout", "-serial"], input=shown, capture_output=True)
    return int(text.stdout.decode().strip().removeprefix("serial="), 16)


def test_a_new_certificate_for_new_connections(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    put_certificate(pair, 1)
    server = Server(tmp_path / "data", "--tls-cert", str(pair[0]), "--tls-key", str(pair[1]))
    try:
        assert serial(server.address) == 1
        credentials = grpc.ssl_channel_credentials(pair[0].read_bytes())
        with Client(server.address, credentials=credentials) as client:
            content = token_ids(some_tokens(20))
            stream = client.stream("a", content, max_tokens=300, ignore_eos=True)
            next(stream)
            put_certificate(pair, 2)
            hang_up(server, "read again the TLS certificate")
            assert serial(server.address) == 2
            assert sum(len(event.delta.token_ids) for event in stream) == 300
            assert client.get("a").token_count == 320

        pair[0].write_text("no certificate")
        hang_up(server, "SIGHUP changed nothing: the TLS certificate")
        assert serial(server.address) == 2
    finally:
        server.kill()
