"""Several answers to one prompt, over a real socket: one prefill, agents of their own, nothing copied."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import grpc
import pytest

from tests.e2e.harness import Answer, Client, chat, refusal_of, refused, some_tokens, text, token_ids
from warmkv import v1

DRAWN = v1.SamplingParams(temperature=1.0, seed=41)


def of(answer: Answer, candidate: int) -> list[v1.GenerateDelta]:
    return [delta for delta in answer.deltas if delta.candidate == candidate]


def tokens_of(answer: Answer, candidate: int) -> list[int]:
    return [token for delta in of(answer, candidate) for token in delta.token_ids]


def names(agent: str, count: int) -> list[str]:
    return [f"{agent}-{number}" for number in range(count)]


def test_one_prefill_and_an_agent_for_each(client: Client, agent: str, seed: int) -> None:
    held, new = some_tokens(300, seed), some_tokens(400, seed + 1)
    client.prime(agent, token_ids(held))
    before = client.stats().counters.prefilled_tokens
    ids = names(agent, 4)
    answer = client.generate(agent, token_ids(new), candidate_agent_ids=ids, sampling=DRAWN, max_tokens=12)
    assert client.stats().counters.prefilled_tokens - before == answer.cache.prefilled_tokens == 400
    assert (answer.cache.cached_tokens, answer.cache.prompt_tokens) == (300, 700)
    assert [each.agent.agent_id for each in answer.finished.candidates] == ids
    assert answer.finished.agent == client.get(agent)
    assert (client.get(agent).token_count, client.get(agent).revision) == (300, 1)
    assert answer.finished.persisted
    assert len({tuple(tokens_of(answer, number)) for number in range(4)}) > 1
    for number, ended in enumerate(answer.finished.candidates):
        alone = client.generate(
            agent,
            token_ids(new),
            ephemeral=True,
            sampling=v1.SamplingParams(temperature=1.0, seed=41 + number),
            max_tokens=12,
            top_logprobs=1,
        )
        assert tokens_of(answer, number) == alone.tokens
        total = sum(each.logprob for delta in alone.deltas for each in delta.logprobs)
        assert ended.logprob_sum == pytest.approx(total, abs=0.5)
        assert ended.completion_tokens == 12
        assert (ended.agent.token_count, ended.agent.revision) == (712, 1)
        assert client.get(ids[number]).shared_bytes > 0.6 * ended.agent.warm_bytes  # two of its three blocks
    client.evict(ids[1])
    for each in (ids[0], ids[1]):
        more = client.generate(each, token_ids(new[:9]), max_tokens=2)
        assert (more.cache.cached_tokens, more.cache.prefilled_tokens) == (712, 9)


def test_candidates_that_nobody_keeps(client: Client, agent: str) -> None:
    client.prime(agent, text("A story."))
    before = client.get(agent)
    answer = client.generate(agent, text(" Once"), candidates=3, ephemeral=True, sampling=DRAWN, max_tokens=6)
    assert client.get(agent).revision == before.revision
    assert [each.HasField("agent") for each in answer.finished.candidates] == [False] * 3
    assert not any(delta.logprobs for delta in answer.deltas)
    whole = client.generate(
        agent,
        text(" Once"),
        candidates=3,
        ephemeral=True,
        sampling=DRAWN,
        max_tokens=6,
        stream_mode="STREAM_MODE_FINAL",
    )
    assert sorted(delta.candidate for delta in whole.deltas) == [0, 1, 2]
    for number in range(3):
        assert tokens_of(whole, number) == tokens_of(answer, number)
        (only,) = of(whole, number)
        assert only.text == "".join(delta.text for delta in of(answer, number))
    assert not client.generate("", text("a"), candidates=1).finished.candidates


def test_each_is_held_to_the_same_format(client: Client) -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4}
    wanted = v1.ResponseFormat(json_schema=json.dumps(schema))
    answer = client.generate(
        "", text("x"), candidates=6, response_format=wanted, sampling=DRAWN, max_tokens=90, ignore_eos=False
    )
    assert {each.finish_reason for each in answer.finished.candidates} == {v1.FINISH_REASON_STOP}
    for number in range(6):
        assert 2 <= len(json.loads("".join(delta.text for delta in of(answer, number)))) <= 4


def test_a_chat_goes_on_behind_each(client: Client, agent: str) -> None:
    question, follow = chat(("user", "Who are you?")), chat(("user", "And then?"))
    client.generate(f"{agent}-alone", question, max_tokens=9, ignore_eos=False)
    client.generate(agent, question, candidate_agent_ids=names(agent, 2), max_tokens=9, ignore_eos=False)
    wanted = client.count(follow, agent_id=f"{agent}-alone").token_ids
    for each in names(agent, 2):
        assert client.count(follow, agent_id=each).token_ids == wanted


def test_deltas_of_each_come_as_they_are_sampled(client: Client) -> None:
    answer = client.generate("", text("x"), candidates=2, sampling=DRAWN, max_tokens=30)
    assert [len(tokens_of(answer, number)) for number in range(2)] == [30, 30]
    runs = [number for number, _ in groupby(delta.candidate for delta in answer.deltas)]
    assert len(runs) > 10


def test_what_was_sampled_until_a_cancel_is_kept(client: Client, agent: str) -> None:
    ids = names(agent, 2)
    call = client.stream(agent, text("On and on"), candidate_agent_ids=ids, max_tokens=4000, ignore_eos=True)
    seen: set[int] = set()
    for event in call:
        if event.HasField("delta"):
            seen.add(event.delta.candidate)
        if len(seen) == 2:
            break
    call.cancel()
    prompt = client.count(text("On and on")).token_count
    for each in ids:
        client.evict(each)  # waits for its turn, and so for the commit
        assert prompt < client.get(each).token_count < prompt + 4000
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        client.get(agent)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"candidates": 17}, "candidates"),
        ({"candidates": 2}, "candidates"),
        ({"candidates": 3, "candidate_agent_ids": ["a", "b"]}, "candidates"),
        ({"candidate_agent_ids": ["a", "a"]}, "candidate_agent_ids"),
        ({"candidate_agent_ids": ["a", "?"]}, "candidate_agent_ids[1]"),
        ({"candidate_agent_ids": ["a"], "ephemeral": True}, "candidate_agent_ids"),
        ({"candidate_agent_ids": ["a"], "request_id": "r"}, "request_id"),
    ],
    ids=str,
)
def test_what_does_not_go_together(client: Client, agent: str, fields: dict[str, Any], named: str) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        client.generate(agent, text("a"), **fields)
    assert named in found[0].fields


def test_they_are_new(client: Client, agent: str) -> None:
    client.prime(f"{agent}-there", text("a"))
    with pytest.raises(grpc.RpcError) as caught:
        client.generate(agent, text("a"), candidate_agent_ids=[f"{agent}-new", f"{agent}-there"])
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "AGENT_EXISTS")
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        client.get(f"{agent}-new")
