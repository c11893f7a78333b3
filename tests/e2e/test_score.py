"""Log probabilities of given content, and the generation prompt that Extend puts behind a chat."""

from __future__ import annotations

import math
from pathlib import Path

import grpc
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load

from tests.e2e.harness import Client, chat, refused, serving, some_tokens, text, token_ids
from tests.engine.folders import END
from warmkv import v1
from warmkv_server.engine.model.load import BUILT_IN

TOLERANCE = 0.15
"""Between one token at a time and a chunk of them: rounding turns a value of 4 bits now and then."""
EXACT = 1e-3
"""The same where KV is kept as computed."""


def score(client: Client, agent: str, content: v1.Content, **fields: int) -> list[v1.ScoreResponse]:
    request = v1.ScoreRequest(agent_id=agent, content=content, **fields)
    return list(client.agents.Score(request, timeout=60))


def told(responses: list[v1.ScoreResponse]) -> list[v1.TokenLogprobs]:
    assert all(len(each.tokens) <= 256 for each in responses)
    assert [each.HasField("logprob_sum") for each in responses] == [False] * (len(responses) - 1) + [True]
    return [token for each in responses for token in each.tokens]


def test_content_is_scored_behind_the_context_and_nothing_is_kept(client: Client, agent: str, seed: int) -> None:
    tokens = some_tokens(700, seed)
    client.prime(agent, token_ids(tokens[:300]))
    before = client.get(agent)
    responses = score(client, agent, token_ids(tokens[300:]), top_logprobs=3)
    behind, last = told(responses), responses[-1]
    assert [each.token_id for each in behind] == tokens[300:]
    assert (last.cache.cached_tokens, last.cache.prefilled_tokens) == (299, 401)
    assert last.logprob_sum == pytest.approx(sum(each.logprob for each in behind), abs=1e-2)
    for each in behind:
        values = [top.logprob for top in each.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert each.logprob <= values[0] + 1e-6
    after = client.get(agent)
    assert (after.token_count, after.revision, after.warm_bytes) == (300, before.revision, before.warm_bytes)
    client.evict(agent)
    again = told(score(client, agent, token_ids(tokens[300:]), top_logprobs=3))
    assert [each.logprob for each in again] == [each.logprob for each in behind]
    alone = told(score(client, "", token_ids(tokens)))
    assert [each.token_id for each in alone] == tokens[1:]
    assert not any(each.top for each in alone)


def test_it_is_what_mlx_lm_says(client: Client, tmp_path: Path) -> None:
    model = load(str(BUILT_IN / "tiny"))[0]
    model.set_dtype(mx.float32)  # as the server does on a CPU
    content = "The old library stands by the river. It has many books, and the door is open every day."
    ids = list(client.count(text(content)).token_ids)
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    own = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    expected = [float(own[place, token]) for place, token in enumerate(ids[1:])]
    with serving(tmp_path / "data", "--kv-bits", "0") as (_, exact):
        scored = [each.logprob for each in told(score(exact, "", text(content)))]
    assert scored == pytest.approx(expected, abs=EXACT)


def test_it_is_what_the_answer_was_chosen_with(client: Client) -> None:
    answer = client.generate("", text("hello there"), max_tokens=6, top_logprobs=1)
    chosen = [each.logprob for delta in answer.deltas for each in delta.logprobs]
    whole = [*client.count(text("hello there")).token_ids, *answer.tokens]
    scored = told(score(client, "", token_ids(whole)))[-6:]
    assert [each.logprob for each in scored] == pytest.approx(chosen, abs=TOLERANCE)


def test_what_can_not_be_scored(client: Client, agent: str) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        score(client, agent, text("a"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_CONTENT"):
        score(client, "", text(""))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        score(client, "?", text("a"), top_logprobs=21)
    assert found[0].fields == ["agent_id", "top_logprobs"]
    (only,) = score(client, "", token_ids([500]))
    assert (only.logprob_sum, only.cache.prompt_tokens, list(only.tokens)) == (0.0, 1, [])


def test_forks_of_what_ends_with_the_generation_prompt_answer_without_content(client: Client, agent: str) -> None:
    question = chat(("user", "Who are you?"))
    client.prime(agent, text("A talk."))
    client.extend(agent, question, generation_prompt=True)
    client.fork(agent, f"{agent}-fork")
    answer = client.generate(f"{agent}-fork", max_tokens=20, ignore_eos=False)
    assert answer.cache.prefilled_tokens == 1
    client.prime(f"{agent}-whole", text("A talk."))
    whole = client.generate(f"{agent}-whole", question, max_tokens=20, ignore_eos=False)
    assert (answer.tokens, answer.text) == (whole.tokens, whole.text)
    assert END in answer.tokens or len(answer.tokens) == 20
    follow = chat(("user", "And then?"))
    one, other = (client.count(follow, agent_id=f"{agent}-{name}") for name in ("fork", "whole"))
    assert list(one.token_ids) == list(other.token_ids)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        client.extend(agent, text("a"), generation_prompt=True)
    assert found[0].fields == ["generation_prompt"]


def test_the_sum_is_a_number_that_can_be_compared(client: Client) -> None:
    likely, odd = (score(client, "", text(words))[-1].logprob_sum for words in ("It is a good day", "It is a qzx vbk"))
    assert math.isfinite(likely)
    assert likely > odd
