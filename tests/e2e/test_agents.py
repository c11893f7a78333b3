"""The life of an agent: prime, extend, fork, inspect, update, delete."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.e2e.harness import Client, refusal_of, refused, serving, some_tokens, text, token_ids
from tests.e2e.waiting import await_that, found
from warmkv import v1

NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND")
MISMATCH = (grpc.StatusCode.ABORTED, "REVISION_MISMATCH")


def test_prime_makes_the_context_exactly_the_content(client: Client, agent: str, seed: int) -> None:
    tokens = some_tokens(600, seed)
    client.prime(agent, token_ids(tokens))
    shorter = client.prime(agent, token_ids(tokens[:400]))
    assert (shorter.agent.token_count, shorter.agent.revision) == (400, 2)
    assert (shorter.cache.cached_tokens, shorter.cache.prefilled_tokens) == (400, 0)
    other = client.prime(agent, token_ids([*tokens[:300], 301, *some_tokens(50, seed + 1)]))
    assert (other.agent.token_count, other.agent.revision) == (351, 3)
    assert other.cache.cached_tokens == 300


def test_priming_the_same_again_changes_nothing_but_what_is_not_the_context(
    client: Client, agent: str, seed: int
) -> None:
    content = token_ids(some_tokens(300, seed))
    first = client.prime(agent, content, labels={"a": "1"})
    again = client.prime(agent, content, pinned=True, ttl=Duration(seconds=60), labels={"b": "2"})
    assert again.agent.revision == first.agent.revision == 1
    assert (again.cache.source, again.cache.cached_tokens) == (v1.CACHE_SOURCE_HOT, 300)
    assert again.agent.pinned
    assert again.agent.ttl.seconds == 60
    assert dict(again.agent.labels) == {"b": "2"}
    assert again.agent.create_time == first.agent.create_time
    assert again.persisted
    kept = client.prime(agent, content)
    assert (kept.agent.pinned, kept.agent.ttl.seconds, dict(kept.agent.labels)) == (True, 60, {"b": "2"})


def test_extend_appends_and_computes_only_what_is_new(client: Client, agent: str, seed: int) -> None:
    client.prime(agent, token_ids(some_tokens(300, seed)))
    extended = client.extend(agent, token_ids([301, 302, 303]))
    assert (extended.agent.token_count, extended.agent.revision) == (303, 2)
    assert (extended.cache.prompt_tokens, extended.cache.cached_tokens) == (303, 300)
    assert extended.cache.prefilled_tokens == 3
    assert extended.persisted
    assert extended.timings.first_token.ToNanoseconds() == 0
    same = client.prime(agent, token_ids([*some_tokens(300, seed), 301, 302, 303]))
    assert same.agent.revision == 2


def test_extend_needs_an_agent(client: Client, agent: str) -> None:
    with refused(*NOT_FOUND):
        client.extend(agent, text("x"))


def test_expected_revision_is_checked(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(20, seed))
    with refused(*MISMATCH):
        client.prime(agent, content, expected_revision=1)
    assert client.prime(agent, content, expected_revision=0).agent.revision == 1
    with refused(*MISMATCH):
        client.prime(agent, content, expected_revision=0)
    with refused(*MISMATCH):
        client.extend(agent, content, expected_revision=2)
    assert client.extend(agent, content, expected_revision=1).agent.revision == 2
    with refused(*MISMATCH):
        client.generate(agent, text("x"), expected_revision=1)
    assert client.generate(agent, text("x"), expected_revision=2).finished.agent.revision == 3
    with refused(*MISMATCH):
        client.generate(agent, text("x"), expected_revision=2, ephemeral=True)


def test_a_fork_goes_its_own_way(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(300, seed))
    source = client.prime(agent, content, pinned=True, ttl=Duration(seconds=900), labels={"team": "red"}).agent
    client.extend(agent, text(" more"))
    written = client.stats().counters.kv_bytes_written
    forked = client.fork(agent, f"{agent}-fork")
    assert client.stats().counters.kv_bytes_written == written
    assert (forked.agent_id, forked.parent_agent_id, forked.revision) == (f"{agent}-fork", agent, 1)
    assert forked.token_count == client.get(agent).token_count
    assert (forked.pinned, forked.ttl, dict(forked.labels)) == (False, source.ttl, {"team": "red"})
    assert forked.shared_bytes == forked.warm_bytes == client.get(agent).shared_bytes
    client.generate(forked.agent_id, text(" on"))
    assert client.get(agent).revision == 2
    client.delete(agent)
    assert client.generate(forked.agent_id, text(" and on")).finished.cache.source == v1.CACHE_SOURCE_HOT


def test_a_fork_needs_a_source_and_a_free_name(client: Client, agent: str, seed: int) -> None:
    with refused(*NOT_FOUND):
        client.fork(agent, f"{agent}-fork")
    client.prime(agent, token_ids(some_tokens(20, seed)))
    with refused(grpc.StatusCode.ALREADY_EXISTS, "AGENT_EXISTS"):
        client.fork(agent, agent)


def test_evict_needs_an_agent_and_works_on_pinned_ones(client: Client, agent: str, seed: int) -> None:
    with refused(*NOT_FOUND):
        client.evict(agent)
    client.prime(agent, token_ids(some_tokens(300, seed)), pinned=True)
    assert client.evict(agent).bytes_freed > 0
    assert client.get(agent).tier == v1.TIER_WARM
    assert client.get(agent).revision == 1


def test_get_does_not_count_as_use(client: Client, agent: str, seed: int) -> None:
    with refused(*NOT_FOUND):
        client.get(agent)
    client.prime(agent, token_ids(some_tokens(20, seed)), ttl=Duration(seconds=900))
    first, second = client.get(agent), client.get(agent)
    assert first == second
    assert first.activity == v1.ACTIVITY_IDLE
    assert first.expire_time.ToNanoseconds() == first.last_used_time.ToNanoseconds() + 900 * 10**9
    used = client.generate(agent, text("x")).finished.agent
    assert used.last_used_time.ToNanoseconds() > first.last_used_time.ToNanoseconds()
    assert used.create_time == first.create_time


def test_an_agent_is_gone_when_its_time_to_live_is_over(client: Client, agent: str, seed: int) -> None:
    client.prime(agent, token_ids(some_tokens(20, seed)), ttl=Duration(nanos=200_000_000))
    await_that(lambda: not found(client, agent))
    with refused(*NOT_FOUND):
        client.get(agent)


def test_list_pages_and_filters(tmp_path: Path) -> None:
    names = [f"agent-{n:02}" for n in range(7)]
    with serving(tmp_path / "data") as (_, client):
        for number, name in enumerate(names):
            labels = {"parity": "odd" if number % 2 else "even", "n": str(number)}
            client.prime(name, token_ids(some_tokens(20, number)), labels=labels)
        assert [agent.agent_id for agent in client.list().agents] == names
        assert client.list().next_page_token == ""

        found, page_token = [], ""
        for _ in range(10):
            page = client.list(page_size=3, page_token=page_token)
            found += [agent.agent_id for agent in page.agents]
            client.prime(found[-1] + "-new", token_ids(some_tokens(5)))  # what comes behind is still seen once
            page_token = page.next_page_token
            if not page_token:
                break
        assert [name for name in found if not name.endswith("-new")] == names
        assert len(found) == len(set(found))

        odd = client.list(labels={"parity": "odd"})
        assert [agent.agent_id for agent in odd.agents] == names[1::2]
        assert [agent.agent_id for agent in client.list(labels={"parity": "odd", "n": "3"}).agents] == ["agent-03"]
        client.evict("agent-03")
        assert [agent.agent_id for agent in client.list(tier=v1.TIER_WARM).agents] == ["agent-03"]
        hot = [agent.agent_id for agent in client.list(tier=v1.TIER_HOT, labels={"parity": "odd"}).agents]
        assert hot == ["agent-01", "agent-05"]

        page = client.list(page_size=1, labels={"parity": "odd"})
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusals:
            client.list(page_size=1, page_token=page.next_page_token)
        assert refusals[0].fields == ["page_token"]


def test_update_changes_what_the_mask_names(client: Client, agent: str, seed: int) -> None:
    before = client.prime(agent, token_ids(some_tokens(20, seed)), labels={"a": "1"}).agent
    new = v1.Agent(agent_id=agent, pinned=True, ttl=Duration(seconds=60), labels={"b": "2"}, token_count=5)
    pinned = client.update(new, "pinned")
    assert (pinned.pinned, pinned.HasField("ttl"), dict(pinned.labels)) == (True, False, {"a": "1"})
    rest = client.update(new, "ttl", "labels")
    assert (rest.pinned, rest.ttl.seconds, dict(rest.labels)) == (True, 60, {"b": "2"})
    assert rest.expire_time.seconds > 0
    assert (rest.revision, rest.token_count) == (before.revision, before.token_count)
    endless = client.update(v1.Agent(agent_id=agent), "ttl")
    assert not endless.HasField("ttl")
    assert not endless.HasField("expire_time")
    with refused(*NOT_FOUND):
        client.update(v1.Agent(agent_id=f"{agent}-2"), "pinned")


def test_what_was_changed_is_there_after_kill_9(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (server, client):
        for name in "abcd":
            client.prime(name, token_ids(some_tokens(300, ord(name))), labels={"name": name})
        client.update(v1.Agent(agent_id="a", pinned=True, ttl=Duration(seconds=900)), "pinned", "ttl")
        client.fork("b", "e")
        client.delete("c")
        client.extend("d", text(" more"))
        before = {agent.agent_id: agent for agent in client.list().agents}
        server.kill()
    with serving(tmp_path / "data") as (_, client):
        after = {agent.agent_id: agent for agent in client.list().agents}
        assert list(after) == ["a", "b", "d", "e"]
        for name, agent in after.items():
            agent.tier, agent.hot_bytes = before[name].tier, before[name].hot_bytes
            assert agent == before[name]


def test_nothing_is_called_persisted_where_nothing_is_synced(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--durability", "none") as (server, client):
        assert client.info().durability == v1.DURABILITY_NONE
        primed = client.prime("a", token_ids(some_tokens(300)), request_id="prime")
        assert not primed.persisted
        assert not client.generate("a", text(" on")).finished.persisted
        assert client.evict("a").bytes_freed > 0
        assert client.prime("a", token_ids(some_tokens(300)), request_id="prime") == primed
        server.kill()
    with serving(tmp_path / "data", "--durability", "fsync") as (_, client):
        assert client.get("a").revision == 2  # the system didn't crash
        assert client.generate("a", text(" on")).finished.persisted


def test_delete_is_for_good(client: Client, agent: str, seed: int) -> None:
    with refused(*NOT_FOUND):
        client.delete(agent)
    client.delete(agent, allow_missing=True)
    client.prime(agent, token_ids(some_tokens(300, seed)))
    client.delete(agent)
    with refused(*NOT_FOUND):
        client.get(agent)
    with refused(*NOT_FOUND):
        client.delete(agent)
    assert client.prime(agent, token_ids(some_tokens(20, seed)), expected_revision=0).agent.revision == 1


@pytest.mark.parametrize("damage", ["corrupt", "missing"])
def test_a_damaged_agent_can_be_deleted(tmp_path: Path, damage: str) -> None:
    with serving(tmp_path / "data") as (server, client):
        client.prime("a", token_ids(some_tokens(600)))
        client.evict("a")
        for path in server.files():
            if damage == "corrupt":
                path.write_bytes(b"not a block")
            else:
                path.unlink()
        client.delete("a")
        with refused(*NOT_FOUND):
            client.get("a")


def test_update_during_the_first_commit_never_blames_the_disk(client: Client, agent: str, seed: int) -> None:
    """It waits for the commit, or there is no such agent yet."""
    for number in range(40):
        name = f"{agent}-{number}"
        request = v1.PrimeRequest(agent_id=name, content=token_ids(some_tokens(10, seed + number)))
        priming = client.agents.Prime.future(request)
        reasons: list[str] = []
        while True:
            try:
                client.update(v1.Agent(agent_id=name, labels={"k": "v"}), "labels")
                break
            except grpc.RpcError as error:
                reasons.append(refusal_of(error).reason)
        assert set(reasons) <= {"AGENT_NOT_FOUND"}
        assert priming.result().persisted
        assert client.get(name).labels == {"k": "v"}
