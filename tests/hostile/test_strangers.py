"""What callers without a token, and messages too large, cost those who are served."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import Client, Server, refused, serving, text
from tests.hostile import http2
from warmkv import v1

LIMIT = 16 << 20
METHODS = (b"AgentService/Prime", b"AgentService/Generate", b"ServerService/CountTokens")
STRANGERS = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    folder = tmp_path_factory.mktemp("strangers")
    tokens = folder / "tokens"
    tokens.write_text("red a-token\n")
    flags = ("--token-file", str(tokens))
    with serving(folder / "data", *flags) as (server, _), Client(server.address, token="a-token") as client:
        yield server, client


@pytest.mark.parametrize("token", [None, "a-token"], ids=["without a token", "with a token"])
def test_inflating_calls_hold_up_nobody(pair: tuple[Server, Client], token: str | None) -> None:
    """120 MB that gzip to 116 KB, 24 times at once, on each of three RPCs and on health itself."""
    server, client = pair
    bomb = gzip.compress(b"\n" * (120 << 20))
    resident = resident_bytes(server)
    alone = longest_gap(client, threading.Event(), calls=50)
    refusal = b"this server needs the metadata" if token is None else b"more than %d bytes, inflated" % LIMIT
    refusals = {b"/warmkv.v1." + method: refusal for method in METHODS}
    refusals[http2.CHECK] = b"this server takes 4096"
    for path, words in refusals.items():
        ended = threading.Event()
        attack = threading.Thread(target=_attack, args=(server.address, path, token, bomb, words, ended))
        attack.start()
        gap = longest_gap(client, ended)
        attack.join()
        print(f"{path.decode()}: longest gap {gap * 1000:.0f} ms (alone {alone * 1000:.0f} ms)")
        assert gap < max(1.5, 10 * alone)
    grown = resident_bytes(server) - resident
    print(f"resident memory grew by {grown >> 20} MiB")
    # Of those without a token nothing is read; of the others no more than a message may be long.
    assert grown < STRANGERS * (LIMIT if token else 5 * len(bomb))


def _attack(address: str, path: bytes, token: str | None, bomb: bytes, refusal: bytes, ended: threading.Event) -> None:
    message = http2.message(bomb, flag=1)
    pieces = [message[at : at + 16_000] for at in range(0, len(message), 16_000)]
    bearer = (b"authorization", None if token is None else f"Bearer {token}".encode())
    header = http2.fields((b"grpc-encoding", b"gzip"), bearer, path=path)
    missing: list[bytes] = []

    def once() -> None:
        with http2.connection(address) as stranger:
            stranger.begin()
            stranger.send(http2.frame(http2.HEADERS, http2.END_HEADERS, 1, header))
            for piece in pieces:
                stranger.send(http2.frame(http2.DATA, 0, 1, piece))
            stranger.send(http2.frame(http2.DATA, 1, 1))
            said = stranger.answer()
            if refusal not in said:
                missing.append(said)

    threads = [threading.Thread(target=once) for _ in range(STRANGERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    assert not missing, missing[0]


def longest_gap(client: Client, until: threading.Event, calls: int = 0) -> float:
    """The longest of so many health checks, one after another, or of those until an event and one more; seconds."""
    longest = 0.0
    while True:
        last = until.is_set()
        began = time.perf_counter()
        assert client.health_of() == "SERVING"
        longest, calls = max(longest, time.perf_counter() - began), calls - 1
        if last or calls == 0:
            return longest


def resident_bytes(server: Server) -> int:
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such line")


def test_who_is_known_is_told_how_large_a_message_may_be(pair: tuple[Server, Client]) -> None:
    server, client = pair
    too_large = (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        for over in (LIMIT + 1, 2 * LIMIT - 100):
            with refused(*too_large):
                prime(client, "x" * over, compression)
    with pytest.raises(grpc.RpcError) as caught:
        prime(client, "x" * (3 * LIMIT), grpc.Compression.NoCompression)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.health_of() == "SERVING"
    assert "Traceback" not in server.log_text()


def prime(client: Client, words: str, compression: grpc.Compression) -> v1.PrimeResponse:
    request = v1.PrimeRequest(agent_id="a", content=text(words))
    return client.agents.Prime(request, metadata=client.metadata, compression=compression, timeout=120)


def test_compressed_requests_are_served(pair: tuple[Server, Client]) -> None:
    _, client = pair
    words = "The same words, again and again. " * 50
    response = prime(client, words, grpc.Compression.Gzip)
    assert response.agent.token_count == client.count(text(words)).token_count
