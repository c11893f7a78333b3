"""Where a context came from: cold, hot, warm, shared, and what the report of it adds up to."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import Client, check_sums, refused, serving, some_tokens, text, token_ids
from warmkv import v1


def test_a_context_is_hot_after_prime_and_warm_after_evict_and_gone_after_delete(
    client: Client, agent: str, seed: int
) -> None:
    content = token_ids(some_tokens(1000, seed))
    primed = client.prime(agent, content)
    check_sums(primed.cache)
    assert primed.cache.source == v1.CACHE_SOURCE_COLD
    assert (primed.cache.cached_tokens, primed.cache.prefilled_tokens) == (0, 1000)
    assert primed.persisted
    assert (primed.agent.token_count, primed.agent.revision, primed.agent.tier) == (1000, 1, v1.TIER_HOT)
    assert primed.agent.hot_bytes > 0
    assert primed.agent.warm_bytes > primed.agent.hot_bytes  # headers included

    hot = client.generate(agent, text(" and then"), ephemeral=True)
    check_sums(hot.cache)
    assert hot.started.cache == hot.cache
    assert hot.cache.source == v1.CACHE_SOURCE_HOT
    assert (hot.cache.cached_tokens, hot.cache.hot_tokens, hot.cache.bytes_loaded) == (1000, 1000, 0)

    evicted = client.evict(agent)
    assert evicted.agent.tier == v1.TIER_WARM
    assert evicted.agent.hot_bytes == 0
    assert evicted.bytes_freed == primed.agent.hot_bytes
    warm = client.generate(agent, text(" and then"), ephemeral=True)
    check_sums(warm.cache)
    assert warm.cache.source == v1.CACHE_SOURCE_WARM
    assert (warm.cache.cached_tokens, warm.cache.warm_tokens) == (1000, 1000)
    assert warm.cache.bytes_loaded == primed.agent.warm_bytes
    assert warm.tokens == hot.tokens

    client.delete(agent)
    cold = client.generate(agent, content)
    check_sums(cold.cache)
    assert cold.cache.source == v1.CACHE_SOURCE_COLD
    assert cold.cache.cached_tokens == 0
    assert cold.finished.agent.revision == 1


def test_the_same_content_of_another_agent_is_shared_as_long_as_one_holds_it(
    client: Client, agent: str, seed: int
) -> None:
    content = token_ids(some_tokens(600, seed))
    client.prime(agent, content)
    other = client.prime(f"{agent}-2", content)
    check_sums(other.cache)
    assert other.cache.source == v1.CACHE_SOURCE_SHARED
    assert other.cache.shared_tokens == 600
    assert other.agent.shared_bytes == other.agent.warm_bytes
    client.delete(agent)
    client.delete(f"{agent}-2")
    third = client.prime(f"{agent}-3", content)
    assert third.cache.source == v1.CACHE_SOURCE_COLD


def test_a_request_without_an_agent_reuses_what_agents_hold(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(300, seed))
    client.prime(agent, content)
    answer = client.generate("", content)
    check_sums(answer.cache)
    assert answer.cache.source == v1.CACHE_SOURCE_SHARED
    assert answer.cache.shared_tokens == 299  # the last token is computed for its logits


def test_the_blocks_of_a_fork_are_its_own(client: Client, agent: str, seed: int) -> None:
    client.prime(agent, token_ids(some_tokens(300, seed)))
    client.fork(agent, f"{agent}-fork")
    hot = client.generate(f"{agent}-fork", text(" x"), ephemeral=True)
    assert (hot.cache.source, hot.cache.hot_tokens) == (v1.CACHE_SOURCE_HOT, 300)
    client.evict(f"{agent}-fork")
    assert client.get(agent).hot_bytes == 0  # dropped also where another shares them
    warm = client.generate(f"{agent}-fork", text(" x"), ephemeral=True)
    assert (warm.cache.source, warm.cache.warm_tokens) == (v1.CACHE_SOURCE_WARM, 300)
    assert warm.tokens == hot.tokens


def test_evict_says_what_the_page_cache_holds(client: Client, agent: str, seed: int) -> None:
    primed = client.prime(agent, token_ids(some_tokens(300, seed)))
    dropped = client.evict(agent, drop_page_cache=True)
    if dropped.resident_bytes_before == -1:
        pytest.skip("this system doesn't tell what its page cache holds")
    assert 0 <= dropped.resident_bytes_after <= dropped.resident_bytes_before <= primed.agent.warm_bytes
    again = client.evict(agent)
    assert again.bytes_freed == 0


def test_hot_warm_and_restarted_answer_the_same_tokens(tmp_path: Path) -> None:
    suffix, answers = text(" So the answer is"), []
    with serving(tmp_path / "data") as (server, client):
        client.prime("a", token_ids(some_tokens(1000)))
        client.extend("a", text(" Some more of it, to have a tail."))
        first = client.generate("a", text(" Well?"))
        count = first.finished.agent.token_count
        answers.append(client.generate("a", suffix, ephemeral=True, max_tokens=24))
        client.evict("a")
        answers.append(client.generate("a", suffix, ephemeral=True, max_tokens=24))
        server.kill()
    with serving(tmp_path / "data") as (_, client):
        agent = client.get("a")
        assert (agent.token_count, agent.revision, agent.tier) == (count, 3, v1.TIER_WARM)
        answers.append(client.generate("a", suffix, ephemeral=True, max_tokens=24))
    sources = [answer.cache.source for answer in answers]
    assert sources == [v1.CACHE_SOURCE_HOT, v1.CACHE_SOURCE_WARM, v1.CACHE_SOURCE_WARM]
    assert {answer.cache.cached_tokens for answer in answers} == {count}
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens


def test_a_corrupt_file_costs_a_prefill_and_says_so(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (server, client):
        client.prime("a", token_ids(some_tokens(600)))
        good = client.generate("a", text(" x"), ephemeral=True)
        client.evict("a")
        damaged = server.files()[0]
        raw = bytearray(damaged.read_bytes())
        raw[-5] ^= 0x40
        damaged.write_bytes(raw)
        answer = client.generate("a", text(" x"), ephemeral=True)
        check_sums(answer.cache)
        assert answer.cache.fallback_reason == v1.FALLBACK_REASON_CHECKSUM
        assert answer.cache.cached_tokens < 600
        assert answer.tokens == good.tokens
        assert list((tmp_path / "data" / "quarantine").iterdir())
        stats = client.stats().counters
        assert stats.quarantined == 1
        assert stats.fallbacks_by_reason == {"FALLBACK_REASON_CHECKSUM": 1}


def test_the_servers_counters_add_up(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (_, client):
        before = client.stats()
        assert before.start_time.seconds > 0
        client.prime("a", token_ids(some_tokens(300)))
        client.prime("b", token_ids(some_tokens(300)))
        client.generate("a", text(" x"), ephemeral=True)
        client.evict("a")
        answer = client.generate("a", text(" x"))
        stats = client.stats()
        counters, gauges = stats.counters, stats.gauges
        assert stats.start_time == before.start_time
        assert counters.requests_by_source == {
            "CACHE_SOURCE_COLD": 1,
            "CACHE_SOURCE_SHARED": 1,
            "CACHE_SOURCE_HOT": 1,
            "CACHE_SOURCE_WARM": 1,
        }
        assert (counters.hot_tokens_reused, counters.warm_tokens_reused, counters.shared_tokens_reused) == (300,) * 3
        assert counters.prefilled_tokens == 300 + 2 * answer.cache.prefilled_tokens
        assert counters.bytes_loaded == answer.cache.bytes_loaded
        assert counters.kv_bytes_written > 0
        assert counters.metadata_bytes_written > 0
        assert counters.evictions >= 1
        assert counters.commits_failed == 0
        assert gauges.hot_bytes > 0
        assert gauges.disk_bytes >= client.get("a").warm_bytes
        assert sum(gauges.agents_by_tier.values()) == 2
        assert (gauges.queue_depth, gauges.batch_size) == (0, 0)


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_a_server_that_lost_its_index_answers_the_same_tokens_from_disk(tmp_path: Path, loss: str) -> None:
    data, suffix = tmp_path / "data", text(" So the answer is")
    with serving(data) as (server, client):
        client.prime("a", token_ids(some_tokens(600)))
        client.extend("a", text(" Some more of it, to have a tail."))
        client.prime("deleted", token_ids(some_tokens(300, 1)))
        client.delete("deleted")
        before = client.get("a")
        hot = client.generate("a", suffix, ephemeral=True, max_tokens=24)
        assert server.terminate() == 0
    index = data / "index.sqlite"
    if loss == "gone":
        index.unlink()
    else:
        index.write_bytes(bytes(4096) + index.read_bytes()[4096:])
    with serving(data) as (server, client):
        after = client.get("a")
        assert (after.token_count, after.revision, after.tier) == (before.token_count, before.revision, v1.TIER_WARM)
        with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
            client.get("deleted")
        warm = client.generate("a", suffix, ephemeral=True, max_tokens=24)
        assert (warm.cache.source, warm.cache.cached_tokens) == (v1.CACHE_SOURCE_WARM, before.token_count)
        assert warm.tokens == hot.tokens
        assert "1 agents with" in server.log_text()
