"""`--speculate-tokens` through a real server: guesses that are right, the same answers, contexts that carry on."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

from tests.e2e.harness import Client, free_port, serving, text
from warmkv import v1

SONG = "Red leaves fall, and the wind sings. " * 6


def counted(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        found = re.search(rf"^warmkv_{name}_total (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_the_same_answers_and_contexts_that_carry_on(client: Client, tmp_path: Path) -> None:
    port = free_port()
    arguments = ("--speculate-tokens", "8", "--metrics-port", str(port))
    with serving(tmp_path / "data", *arguments) as (_, guessing):
        for number, content in enumerate([SONG, "What is a library?"]):
            agent = f"speculate-{number}"
            got = guessing.generate(agent, text(content), max_tokens=60)
            alone = client.generate(agent, text(content), max_tokens=60)
            assert (got.tokens, got.text) == (alone.tokens, alone.text)
            assert [len(delta.token_ids) for delta in got.deltas] == [1] * 60
            assert got.finished.agent.token_count == got.cache.prompt_tokens + 60
        proposed, accepted = counted(port, "proposed_tokens"), counted(port, "accepted_tokens")
        assert 20 <= accepted <= proposed
        guessing.evict("speculate-0")
        more = guessing.generate("speculate-0", text(" And then"), max_tokens=8)
        assert more.cache.source == v1.CACHE_SOURCE_WARM
        assert more.tokens == client.generate("speculate-0", text(" And then"), max_tokens=8).tokens
