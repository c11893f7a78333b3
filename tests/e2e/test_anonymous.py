"""Generate without an agent_id, where contexts are kept: what comes again isn't computed again, and nobody sees it."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import (
    Answer,
    Client,
    Server,
    check_sums,
    free_port,
    refused,
    serving,
    some_tokens,
    text,
    token_ids,
)
from warmkv import v1

TURNS, CHATS = 6, 4


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client, int]]:
    port = free_port()
    folder = tmp_path_factory.mktemp("anonymous")
    with serving(folder / "data", "--keep-anonymous", "1h", "--metrics-port", str(port)) as (server, client):
        yield server, client, port


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def wait_for_hidden(client: Client, number: int) -> None:
    """What a commit makes superfluous goes behind it."""
    ends = time.monotonic() + 60
    while client.stats().gauges.hidden_agents != number:
        assert time.monotonic() < ends, client.stats().gauges
        time.sleep(0.02)


def ask(client: Client, history: list[int], new: list[int], **fields: object) -> tuple[Answer, list[int]]:
    """One more turn of a client that sends everything again: the answer, and the history with it."""
    answer = client.generate("", token_ids(history + new), **fields)
    check_sums(answer.cache)
    return answer, history + new + answer.tokens


def test_every_turn_computes_what_is_new_and_each_chat_leaves_one_context(
    keeping: tuple[Server, Client, int],
) -> None:
    _, client, port = keeping
    client.prime("named", token_ids(some_tokens(300, 99)))
    named = client.get("named")
    histories: list[list[int]] = [[] for _ in range(CHATS)]
    reused = 0
    for turn in range(TURNS):
        for chat in range(CHATS):
            before = len(histories[chat])
            answer, histories[chat] = ask(client, histories[chat], some_tokens(40, 10 * turn + chat))
            assert answer.cache.cached_tokens == before
            assert answer.cache.source == (v1.CACHE_SOURCE_HOT if turn else v1.CACHE_SOURCE_COLD)
            assert not answer.finished.HasField("agent")
            assert not answer.finished.persisted
            reused += before
            assert [agent.agent_id for agent in client.list().agents] == ["named"]
    wait_for_hidden(client, CHATS)
    assert client.get("named") == named
    assert metric(port, "warmkv_hidden_agents") == CHATS
    assert metric(port, "warmkv_hidden_bytes") > 0
    assert metric(port, "warmkv_anonymous_tokens_reused_total") == reused
    assert sum(client.stats().gauges.agents_by_tier.values()) == 1
    # An old branch, and one that two ask for at once.
    answer, _ = ask(client, histories[0][:100], some_tokens(20, 77))
    assert answer.cache.cached_tokens == 100
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda seed: ask(client, histories[1], some_tokens(30, seed))[0], (1, 2)))
    assert [each.cache.cached_tokens for each in both] == [len(histories[1])] * 2
    wait_for_hidden(client, CHATS + 2)


def test_what_was_sampled_before_a_cancel_is_kept_and_ephemeral_keeps_nothing(
    keeping: tuple[Server, Client, int],
) -> None:
    _, client, _ = keeping
    before = client.stats().gauges.hidden_agents
    prompt = some_tokens(300, 500)
    assert client.generate("", token_ids(prompt), ephemeral=True).cache.source == v1.CACHE_SOURCE_COLD
    assert client.stats().gauges.hidden_agents == before
    call = client.stream("", token_ids(prompt), max_tokens=20_000, ignore_eos=True)
    sampled: list[int] = []
    for event in call:
        sampled += event.delta.token_ids
        if len(sampled) > 8:
            break
    call.cancel()
    wait_for_hidden(client, before + 1)
    answer, _ = ask(client, prompt + sampled, some_tokens(5, 501))
    assert answer.cache.cached_tokens == len(prompt) + len(sampled)


def test_each_of_several_answers_can_be_gone_on_with(keeping: tuple[Server, Client, int]) -> None:
    _, client, _ = keeping
    prompt = some_tokens(300, 600)
    hot = v1.SamplingParams(temperature=1.5, seed=7)
    events = client.generate("", token_ids(prompt), candidates=3, sampling=hot)
    answers: list[list[int]] = [[], [], []]
    for delta in events.deltas:
        answers[delta.candidate] += delta.token_ids
    for number, tokens in enumerate(answers):
        answer, _ = ask(client, prompt + tokens, some_tokens(5, 601 + number))
        assert answer.cache.cached_tokens == len(prompt) + len(tokens)


def test_nobody_outside_can_say_their_names(keeping: tuple[Server, Client, int]) -> None:
    _, client, _ = keeping
    name = f"~{'0' * 32}"
    for call in (client.get, client.delete, client.evict, lambda name: client.generate(name, text("a"))):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
            call(name)


def test_they_stay_within_their_bytes_and_are_warm_after_kill_9_and_gone_when_their_time_is_up(tmp_path: Path) -> None:
    data, bytes_flag = tmp_path / "data", ("--anonymous-bytes", "2MB")
    with serving(data, "--keep-anonymous", "1h", *bytes_flag) as (server, client):
        client.prime("named", token_ids(some_tokens(300, 99)))
        largest = 0
        for seed in range(40):
            ask(client, [], some_tokens(200, 1000 + seed))
            largest = max(largest, client.stats().gauges.hidden_bytes)
        assert 1_000_000 < largest < 3_000_000  # with what one commit brings
        _, history = ask(client, [], some_tokens(300, 1))
        _, history = ask(client, history, some_tokens(20, 2))
        server.kill()
    with serving(data, "--keep-anonymous", "1s", *bytes_flag) as (_, client):
        before = client.stats().gauges.hidden_agents
        answer, _ = ask(client, history, some_tokens(20, 3))
        assert answer.cache.source == v1.CACHE_SOURCE_WARM
        assert answer.cache.warm_tokens == len(history)
        wait_for_hidden(client, before - 1)
        assert client.get("named").token_count == 300


def test_without_the_option_nothing_is_kept(client: Client) -> None:
    prompt = some_tokens(300, 700)
    for _ in range(2):
        assert client.generate("", token_ids(prompt)).cache.source == v1.CACHE_SOURCE_COLD
    assert client.stats().gauges.hidden_agents == 0
