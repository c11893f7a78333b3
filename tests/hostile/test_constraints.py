"""Response formats that would take for ever, all memory, or the process; and who waits for them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import grpc
import pytest

from tests.e2e.harness import Client, Refusal, Server, refusal_of, serving, text
from tests.hostile.others import MIB, watching
from warmkv import v1

STREAMS = 4
MAX_DECODE_GAP = 0.2


def schema(value: object) -> v1.ResponseFormat:
    return v1.ResponseFormat(json_schema=json.dumps(value))


def lark(rules: str) -> v1.ResponseFormat:
    return v1.ResponseFormat(lark=rules)


def doubling(count: int, last: str) -> v1.ResponseFormat:
    return lark("start: r0\n" + "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(count)) + f"r{count}: {last}\n")


ATTACKS: dict[str, Callable[[], v1.ResponseFormat]] = {
    "a schema of a megabyte": lambda: schema({"properties": {f"property {n}": {} for n in range(60_000)}}),
    "a hundred thousand alternatives": lambda: v1.ResponseFormat(choices=v1.Choices(texts=map(str, range(100_000)))),
    "as many of a schema": lambda: schema({"enum": list(range(9_000))}),
    "alternatives of objects": lambda: schema(
        {"anyOf": [{"type": "object", "properties": {f"p{n}": {}}, "required": [f"p{n}"]} for n in range(900)]}
    ),
    "expressions that must all match": lambda: schema(
        {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b.*"} for n in range(5, 40)]}
    ),
    "a number that others divide": lambda: schema({"type": "integer", "multipleOf": 99_999_999}),
    "numbers that others divide": lambda: schema(
        {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (7919, 7907, 7901, 7883)]}
    ),
    "an expression of a thousand states": lambda: v1.ResponseFormat(regex="(.*[a-m].{200}[a-k]){1,50}"),
    "an expression that is repeated and repeated": lambda: v1.ResponseFormat(regex="(((a{1,999}){1,999}){1,999})b"),
    "optional letters": lambda: v1.ResponseFormat(regex="a?" * 9_000 + "a" * 9_000),
    "parentheses": lambda: v1.ResponseFormat(regex="(" * 30_000 + ")" * 30_000),
    "more of them": lambda: lark("start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "brackets": lambda: v1.ResponseFormat(json_schema='{"not":' * 9_000),
    "rules that double": lambda: doubling(2_000, '"a"'),
    "an ambiguous grammar": lambda: lark('start: s\ns: s s s | "a" | "aa" | '),
    "references in a circle": lambda: schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "references without an end": lambda: schema(
        {
            "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
            "$ref": "#/$defs/n",
        }
    ),
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    with serving(tmp_path_factory.mktemp("constraints") / "data") as pair:
        yield pair


class Streams:
    """Answers that others read, one after another."""

    def __init__(self, address: str) -> None:
        self.gaps: list[float] = []
        self._address = address
        self._over = Event()
        self._threads = ThreadPoolExecutor(STREAMS)

    def __enter__(self) -> Streams:
        self._running = [self._threads.submit(self._read, number) for number in range(STREAMS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for each in self._running:
            each.result()
        self._threads.shutdown()

    def _read(self, number: int) -> None:
        with Client(self._address) as client:
            while not self._over.is_set():
                last = None
                for event in client.stream("", text(f"Number {number}"), max_tokens=256, ignore_eos=True):
                    now = time.perf_counter()
                    if last is not None and event.HasField("delta"):
                        self.gaps.append(now - last)
                    last = now
                    if self._over.is_set():
                        break


def ninety_ninth(gaps: list[float]) -> float:
    return sorted(gaps)[int(len(gaps) * 0.99)]


def attack(client: Client, wanted: v1.ResponseFormat) -> Refusal | None:
    """None where it is served."""
    try:
        list(client.stream("", text("a"), response_format=wanted, max_tokens=60))
    except grpc.RpcError as error:
        return refusal_of(error)
    return None


def test_they_are_refused_or_served_within_bounds_while_others_are(attacked: tuple[Server, Client]) -> None:
    server, client = attacked
    with Streams(server.address) as alone:
        time.sleep(4)  # a measurement
    with Streams(server.address) as beside, watching(server) as seen:
        for name, made in ATTACKS.items():
            began = time.perf_counter()
            refusal = attack(client, made())
            took = time.perf_counter() - began
            said = f"{refusal.reason}: {refusal.message}" if refusal else "served"
            print(f"{name}: {took:.1f} s, {said}"[:150])
            assert refusal is None or refusal.code in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                grpc.StatusCode.FAILED_PRECONDITION,
            )
            assert took < 60
    quiet, loud = ninety_ninth(alone.gaps), ninety_ninth(beside.gaps)
    print(f"gaps alone {quiet * 1000:.0f} ms, beside {loud * 1000:.0f} ms; {seen.growth / MIB:.0f} MiB more")
    assert loud < max(10 * quiet, 2 * MAX_DECODE_GAP)
    assert seen.growth < 1200 * MIB  # one trial's, and what the streams take


def test_the_server_is_as_before(attacked: tuple[Server, Client]) -> None:
    server, client = attacked
    assert attack(client, v1.ResponseFormat(regex="[a-c]{3}")) is None
    assert server.process.poll() is None
