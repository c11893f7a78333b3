"""One message within the size limit that costs the server seconds and gigabytes to look at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import pytest

from tests.e2e.harness import Client, Server, refusal_of, serving, text
from tests.e2e.waiting import await_that
from tests.hostile import http2
from tests.hostile.others import MIB, resident, watching

AGENTS, SERVER = "/warmkv.v1.AgentService", "/warmkv.v1.ServerService"
ROOM = 16 * MIB - 64
"""Bytes of the largest part of a message of 16 MiB."""


def part(number: int, body: bytes) -> bytes:
    """A field with a string or a message in it."""
    length, size = bytearray(), len(body)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + body


def content(kind: int, body: bytes) -> bytes:
    return part(2, part(kind, body))


IDS_OUT_OF_RANGE = content(2, part(1, b"\xff\x7f" * (ROOM // 2)))
UNPACKED_IDS = content(2, b"\x08\x05" * (ROOM // 2))
MESSAGES_WITHOUT_ROLE = content(3, b"\x0a\x00" * (ROOM // 2))
TEXT = content(1, b"word " * (ROOM // 5))
AGENT = part(1, b"agent")


@dataclass(frozen=True)
class Attack:
    path: str
    body: bytes
    streams: bool = False
    reason: str = "INVALID_FIELD"


ATTACKS = {
    "ids out of range": Attack(f"{AGENTS}/Generate", IDS_OUT_OF_RANGE, True),
    "ids that are not packed": Attack(f"{AGENTS}/Generate", UNPACKED_IDS, True),
    "messages without a role": Attack(f"{AGENTS}/Generate", MESSAGES_WITHOUT_ROLE, True),
    "a stop string": Attack(f"{AGENTS}/Generate", content(1, b"hi") + part(7, b"ab" * (ROOM // 2)), True),
    "stop strings": Attack(f"{AGENTS}/Generate", content(1, b"hi") + part(7, b"") * (ROOM // 2), True),
    "biases": Attack(f"{AGENTS}/Generate", content(1, b"hi") + part(4, part(8, b"") * (ROOM // 2)), True),
    "text": Attack(f"{AGENTS}/Generate", TEXT, True, "CONTEXT_TOO_LONG"),
    "text to prime": Attack(f"{AGENTS}/Prime", AGENT + TEXT, False, "CONTEXT_TOO_LONG"),
    "contents": Attack(f"{AGENTS}/Prime", AGENT + part(2, b"") * (ROOM // 2)),
    "labels": Attack(f"{AGENTS}/Prime", AGENT + content(1, b"hi") + part(5, b"") * (ROOM // 2)),
    "a request id": Attack(f"{AGENTS}/Extend", AGENT + content(1, b"hi") + part(4, b"x" * ROOM)),
    "an agent id": Attack(f"{AGENTS}/GetAgent", part(1, b"x" * ROOM)),
    "a page token": Attack(f"{AGENTS}/ListAgents", part(2, b"x" * ROOM)),
    "labels to look for": Attack(f"{AGENTS}/ListAgents", part(4, part(1, b"key")) * (ROOM // 7)),
    "paths of a mask": Attack(f"{AGENTS}/UpdateAgent", part(1, AGENT) + part(2, part(1, b"") * (ROOM // 2))),
    "a label": Attack(f"{AGENTS}/UpdateAgent", part(1, AGENT + part(10, part(1, b"x" * (ROOM - 64))))),
    "ids to count": Attack(f"{SERVER}/CountTokens", part(1, part(2, part(1, b"\xff\x7f" * (ROOM // 2))))),
    "messages to count": Attack(f"{SERVER}/CountTokens", part(1, part(3, b"\x0a\x00" * (ROOM // 2)))),
    "groups": Attack(f"{AGENTS}/DeleteAgent", b"\x7b\x7c" * (ROOM // 2), False, "MALFORMED_MESSAGE"),
    "an emoji": Attack(f"{AGENTS}/Generate", content(1, "\U0001f600".encode() * (ROOM // 4)), True, "CONTEXT_TOO_LONG"),
}


@dataclass(frozen=True)
class Attacked:
    """A server.

    Attributes:
        at_rest: bytes of RAM that it had before it was attacked, when it had answered once.
        silent: a call to it that was begun then, and whose message never comes.
    """

    server: Server
    client: Client
    at_rest: int
    silent: http2.Connection


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with (
        serving(tmp_path_factory.mktemp("attacked") / "data") as (server, client),
        http2.connection(server.address, patience=120) as silent,
    ):
        client.generate("", text("hi"))
        silent.begin()
        silent.send(http2.frame(http2.HEADERS, http2.END_HEADERS, 1, http2.fields()))
        yield Attacked(server, client, resident(server.process.pid), silent)


@pytest.mark.parametrize("name", ATTACKS)
def test_one_message_costs_others_little(attacked: Attacked, name: str) -> None:
    server, client = attacked.server, attacked.client
    attack = ATTACKS[name]
    assert len(attack.body) <= 16 * MIB
    with watching(server) as seen, ThreadPoolExecutor(2) as attackers:
        refusals = list(attackers.map(lambda _: reason(client, attack), range(2)))
    print(f"{name}: longest gap {seen.longest * 1000:.0f} ms, {seen.growth / MIB:.0f} MiB")
    assert refusals == [attack.reason] * 2
    # What is promised is a tenth of it, on a machine that does nothing else.
    assert seen.longest < 2.5
    # Two are on their way at a time.
    assert seen.growth < 2 * 5 * 16 * MIB


def test_their_memory_comes_back(attacked: Attacked) -> None:
    """But for the pages that the allocators keep a little of: forty messages took up to 160 MiB each."""
    pid, began = attacked.server.process.pid, time.perf_counter()
    await_that(lambda: resident(pid) < attacked.at_rest + 16 * MIB)
    print(f"back at {attacked.at_rest / MIB:.0f} + 16 MiB {time.perf_counter() - began:.0f} s after the last")


def test_a_call_whose_message_never_comes_ends(attacked: Attacked) -> None:
    assert b"send it at once" in attacked.silent.answer()


def send(client: Client, attack: Attack) -> None:
    answer = client.call(attack.path, attack.body, attack.streams)
    if attack.streams:
        list(answer)


def reason(client: Client, attack: Attack) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        send(client, attack)
    refusal = refusal_of(caught.value)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(refusal.fields) <= 21
    return refusal.reason
