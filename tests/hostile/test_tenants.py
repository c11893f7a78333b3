"""One tenant asks for all there is: another gets its share, at once."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.harness import Client, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that

STEP_SECONDS = 0.5
"""For a step that is under way, on a loaded machine; the server's own bound for a chunk beside decoding is 0.2."""

ANSWER = 30_000


class Flood:
    """Answers that nobody wants to end, read as they come."""

    def __init__(self, client: Client, answers: int) -> None:
        self.tokens = 0
        self._streams = [
            client.stream("", token_ids(some_tokens(20 + n, n)), max_tokens=ANSWER, ignore_eos=True, timeout=600)
            for n in range(answers)
        ]
        self._threads = [threading.Thread(target=self._read, args=(stream,)) for stream in self._streams]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: Any) -> None:
        with contextlib.suppress(grpc.RpcError):  # it is cancelled in the end
            for event in stream:
                self.tokens += len(event.delta.token_ids)

    def stop(self) -> None:
        for stream in self._streams:
            stream.cancel()
        for thread in self._threads:
            thread.join()


@contextmanager
def flood(client: Client, answers: int) -> Iterator[Flood]:
    flood = Flood(client, answers)
    try:
        yield flood
    finally:
        flood.stop()


def first_token(client: Client, number: int) -> float:
    """Seconds to the first token of a short answer, as a client sees it."""
    began = time.perf_counter()
    stream = client.stream("", token_ids(some_tokens(40, 1000 + number)), max_tokens=2, ignore_eos=True)
    for event in stream:
        if event.HasField("delta"):
            took = time.perf_counter() - began
    return took


@pytest.mark.parametrize("limit", ["--max-batch=32", "--max-batch=1", "--inflight-bytes=700M"])
def test_another_tenants_flood_leaves_half(limit: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("red red-token\nblue blue-token\n")
    with (
        serving(tmp_path / "data", "--token-file", str(tokens), *limit.split("=")) as (server, _),
        Client(server.address, token="red-token") as red,
        Client(server.address, token="blue-token") as blue,
    ):
        first_token(blue, 0)
        alone = statistics.median(first_token(blue, n) for n in range(1, 6))
        with flood(red, 40) as reds:
            await_that(lambda: reds.tokens > 100)
            took = []
            for n in range(6, 11):
                took.append(first_token(blue, n))
                time.sleep(0.2)
            with flood(blue, 40) as blues:
                await_that(lambda: blues.tokens > 20)
                before = Counter(red=reds.tokens, blue=blues.tokens)
                time.sleep(8)
                had = Counter(red=reds.tokens, blue=blues.tokens) - before
        print(f"{limit}: alone {alone:.3f}, beside {max(took):.3f} s; tokens {dict(had)}")
        assert max(took) <= 5 * alone + STEP_SECONDS
        assert min(had["red"], had["blue"]) >= 0.4 * had.total(), had
