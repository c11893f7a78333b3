"""Messages and what the agents take: nothing is lost or made up on the way."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Any

import pytest

from warmkv import v1
from warmkv_server.agents.types import Activity
from warmkv_server.contract.generation import Delta, Finish, Logprobs, Sampling
from warmkv_server.contract.kv import Fallback, Source
from warmkv_server.kv.store import Tier
from warmkv_server.service import convert


def test_the_digest_of_a_request_tells_all_of_it_but_its_id() -> None:
    base: dict[str, Any] = {"agent_id": "a", "content": v1.Content(text="x"), "labels": {"a": "1", "b": "2"}}
    requests: list[v1.PrimeRequest | v1.ExtendRequest | v1.GenerateRequest] = [
        v1.PrimeRequest(**base),
        v1.PrimeRequest(**{**base, "agent_id": "b"}),
        v1.PrimeRequest(**{**base, "content": v1.Content(text="y")}),
        v1.PrimeRequest(**{**base, "labels": {"a": "1"}}),
        v1.PrimeRequest(**base, expected_revision=0),
        v1.PrimeRequest(**base, pinned=False),
        v1.ExtendRequest(agent_id="a", content=base["content"]),
        v1.GenerateRequest(agent_id="a", content=base["content"]),
    ]
    digests = []
    for request in requests:
        request.request_id = "one"
        first = convert.identity(request)
        request.request_id = "two"
        second = convert.identity(request)
        assert first is not None
        assert second is not None
        assert (first.request_id, second.request_id) == ("one", "two")
        assert first.body_hash == second.body_hash
        digests.append(first.body_hash)
    assert len(set(digests)) == len(requests)
    reordered = v1.PrimeRequest(**{**base, "labels": {"b": "2", "a": "1"}}, request_id="one")
    identity = convert.identity(reordered)
    assert identity is not None
    assert identity.body_hash == digests[0]
    assert convert.identity(v1.PrimeRequest(**base)) is None


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (Source, convert.SOURCES),
        (Fallback, convert.FALLBACKS),
        (Tier, convert.TIERS),
        (Activity, convert.ACTIVITIES),
    ],
    ids=["sources", "fallbacks", "tiers", "activities"],
)
def test_every_word_has_its_name_on_the_wire(words: type[StrEnum], names: dict[Any, Any]) -> None:
    assert set(names) - {None} == set(words)
    assert len(set(names.values())) == len(names)


def test_a_stream_ends_for_one_of_three_reasons() -> None:
    assert set(Finish) - set(convert.FINISHES) == {Finish.CANCELLED, Finish.TOO_COMPLEX, Finish.PREFILLED}


def test_sampling_is_the_defaults_with_what_is_set() -> None:
    defaults = Sampling(temperature=0.7, top_p=0.9, top_k=40)
    assert convert.sampling(v1.SamplingParams(), defaults) == defaults
    given = convert.sampling(v1.SamplingParams(temperature=0, top_k=0, seed=2**64 - 1, logit_bias={5: 1}), defaults)
    assert given == dataclasses.replace(defaults, temperature=0, top_k=0, seed=2**64 - 1, logit_bias={5: 1})


def test_times_keep_their_digits() -> None:
    assert convert.duration(0.1 + 0.2).ToNanoseconds() == 300_000_000
    assert convert.seconds(convert.duration(12.000000001)) == 12.000000001
    assert convert.timestamp(1795478405.096691).ToMicroseconds() == 1795478405096691


@pytest.mark.parametrize("alternatives", [0, 20])
def test_an_answer_is_cut_where_clients_would_not_take_it(alternatives: int) -> None:
    """They take 4 MiB. Joined, the pieces are the answer."""
    top = tuple((4_000_000 + n, -1.5) for n in range(alternatives))
    tokens = tuple(range(2_000_000, 2_040_000))
    logprobs = tuple(Logprobs(token, -0.5, top) for token in tokens) if alternatives else ()
    answer = Delta(tokens, "\U0001f600" * 1_500_000, logprobs)
    messages = list(convert.generate_responses(answer))
    assert all(message.ByteSize() < 4 << 20 for message in messages)
    assert "".join(message.delta.text for message in messages) == answer.text
    assert tuple(token for message in messages for token in message.delta.token_ids) == tokens
    assert sum(len(message.delta.logprobs) for message in messages) == len(logprobs)


def test_an_ordinary_answer_is_one_message() -> None:
    logprobs = tuple(Logprobs(7, -0.5, tuple((n, -1.0) for n in range(20))) for _ in range(5000))
    assert len(list(convert.generate_responses(Delta((7,) * 5000, "seven " * 5000, logprobs)))) == 1
    assert len(list(convert.generate_responses(Delta((), "")))) == 1
