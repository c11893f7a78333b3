"""Clients that ask for long answers and don't read them: what they cost, and that nothing of it is lost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.e2e.harness import Client, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that, is_idle
from tests.hostile.others import MIB, resident
from warmkv import v1

ANSWERS, TOKENS, ALTERNATIVES, ROUNDS = 4, 1_000, 20, 4
TOKEN_BYTES = 400
"""More than an unread token may cost: its id, its letters, its log probability and those of the alternatives."""
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384))
"""Else a client's gRPC takes megabytes that nobody has read."""
NOISE = 5 * MIB
"""Of resident memory in a round; what Python's objects for so many tokens would take is more than twice that."""


def test_answers_that_nobody_reads_cost_their_tokens_alone(tmp_path: Path) -> None:
    """Over connections that each have a window to fill; with a request id what was read is kept too."""
    with serving(tmp_path / "data", "--hot-bytes", "1M") as (server, client):
        pid = server.process.pid

        def ask(name: str, request_id: str = "") -> list[Any]:
            readers = [Client(server.address, options=SMALL_WINDOW) for _ in range(ANSWERS)]
            return [
                reader.stream(
                    f"{name}-{n}",
                    token_ids(some_tokens(20 + n, n)),
                    max_tokens=TOKENS,
                    ignore_eos=True,
                    sampling=v1.SamplingParams(temperature=0),
                    top_logprobs=ALTERNATIVES,
                    timeout=600,
                    request_id=request_id and f"{request_id}-{n}",
                )
                for n, reader in enumerate(readers)
            ]

        def computed(name: str) -> bool:
            return all(is_idle(client, f"{name}-{n}") for n in range(ANSWERS))

        # Resident memory also grows by what computing takes, now and then and more in the first rounds; what being
        # unread costs is in every round's growth.
        unread, sizes = [], []
        for number in range(ROUNDS):
            unread += ask(f"unread-{number}", f"kept-{number}")
            await_that(lambda number=number: computed(f"unread-{number}"))  # type: ignore[misc]
            sizes.append(resident(pid))
        grown = min(after - before for before, after in pairwise(sizes))
        print(f"{ANSWERS} answers of {TOKENS} tokens, computed and not read: {grown / MIB:.1f} MiB more")
        assert grown < ANSWERS * TOKENS * TOKEN_BYTES + NOISE
        # Who reads after all gets all of it.
        first, again = tokens_of(unread[0]), tokens_of(unread[-ANSWERS])
        assert len(first) == TOKENS
        assert again == first
        for stream in unread:
            stream.cancel()


def tokens_of(stream: Any) -> list[int]:
    """Of an answer that is committed in the end."""
    tokens = []
    for event in stream:
        tokens += event.delta.token_ids
    assert event.finished.persisted
    return tokens
