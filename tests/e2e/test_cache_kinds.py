"""The same of models whose caches can't be cut everywhere: windows, and recurrent state."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import Client, check_sums, serving, some_tokens, token_ids
from warmkv import v1


@pytest.mark.parametrize("shape", ["gemma3", "hybrid", "deepseek_v2"])
def test_caches_that_cannot_be_cut_everywhere_answer_the_same_tokens_too(tmp_path: Path, shape: str) -> None:
    content, suffix = token_ids(some_tokens(600)), token_ids([301, 302])
    with serving(tmp_path / "data", "--model", f"random:{shape}") as (server, client):
        client.prime("a", content)
        again = client.prime("a", content)
        assert (again.cache.cached_tokens, again.agent.revision) == (600, 1)
        hot = client.generate("a", suffix, ephemeral=True)
        assert (hot.cache.source, hot.cache.cached_tokens) == (v1.CACHE_SOURCE_HOT, 600)
        assert client.generate("a", ephemeral=True).cache.cached_tokens == 599
        client.evict("a")
        warm = client.generate("a", suffix, ephemeral=True)
        assert (warm.cache.source, warm.cache.cached_tokens) == (v1.CACHE_SOURCE_WARM, 600)
        server.kill()
    with serving(tmp_path / "data", "--model", f"random:{shape}") as (_, client):
        restarted = client.generate("a", suffix, ephemeral=True)
        assert (restarted.cache.source, restarted.cache.cached_tokens) == (v1.CACHE_SOURCE_WARM, 600)
        assert hot.tokens == warm.tokens == restarted.tokens
        client.generate("a", suffix)
        on = client.generate("a")
        check_sums(on.cache)
        reason = v1.FALLBACK_REASON_NOT_TRIMMABLE if shape == "hybrid" else v1.FALLBACK_REASON_UNSPECIFIED
        assert on.cache.fallback_reason == reason  # a recurrent state can't go back by one token


@pytest.mark.parametrize("shape", ["gemma3", "hybrid"])
def test_an_edit_inside_a_long_turn_costs_what_lies_behind_a_boundary_before_it(tmp_path: Path, shape: str) -> None:
    """Also after a restart, and after the context has grown by another turn."""
    content = some_tokens(3300)
    edited = token_ids([*content[:2100], 7, 8, 9])

    def again(client: Client) -> v1.CacheReport:
        return client.generate("a", edited, context_mode=v1.CONTEXT_MODE_REPLACE, ephemeral=True).cache

    with serving(tmp_path / "data", "--model", f"random:{shape}") as (server, client):
        client.prime("a", token_ids(content))
        client.extend("a", token_ids(some_tokens(300, 1)))
        assert again(client).cached_tokens == 2048
        server.kill()
    with serving(tmp_path / "data", "--model", f"random:{shape}") as (_, client):
        cache = again(client)
        assert (cache.source, cache.cached_tokens) == (v1.CACHE_SOURCE_WARM, 2048)
