"""Clients that ask for long answers and don't read them: what they cost, and that nothing of it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Client, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that, is_idle
from tests.hostile.others import MIB, resident

ANSWERS, TOKENS, ALTERNATIVES = 12, 4_000, 5
TOKEN_BYTES = 128
"""More than an unread token may cost: an id, a few letters, its log probability and those of the alternatives."""


@pytest.mark.parametrize("kept", [False, True], ids=["read once", "kept for a retry"])
def test_answers_that_nobody_reads_cost_their_tokens_alone(tmp_path: Path, kept: bool) -> None:
    with serving(tmp_path / "data", "--hot-bytes", "1M") as (server, client):
        pid = server.process.pid

        def ask(name: str) -> list[Any]:
            """Answers that are computed at once, each over a connection that has a window of its own to fill."""
            readers = [Client(server.address) for _ in range(ANSWERS)]
            return [
                reader.stream(
                    f"{name}-{n}",
                    token_ids(some_tokens(20 + n, n)),
                    max_tokens=TOKENS,
                    ignore_eos=True,
                    request_id=f"{name}-{n}" if kept else "",
                    sampling={"top_logprobs": ALTERNATIVES, "temperature": 0},
                )
                for n, reader in enumerate(readers)
            ]

        read = [list(stream) for stream in ask("read")]
        before = resident(pid)
        unread = ask("unread")
        await_that(lambda: all(is_idle(client, f"unread-{n}") for n in range(ANSWERS)))
        grown = resident(pid) - before
        print(f"{ANSWERS} answers of {TOKENS} tokens, computed and not read: {grown / MIB:.1f} MiB more")
        assert grown < ANSWERS * TOKENS * TOKEN_BYTES + 24 * MIB
        # Who reads after all gets what he would have got, in fewer pieces.
        for answer, stream in zip(read, unread, strict=True):
            late = list(stream)
            assert tokens_of(late) == tokens_of(answer)
            assert len(late) < len(answer) / 2
            assert late[-1].finished.persisted


def tokens_of(events: list[Any]) -> list[int]:
    return [token for event in events for token in event.delta.token_ids]
