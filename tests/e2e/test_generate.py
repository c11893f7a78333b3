"""Generate: what streams, what is kept, and how an answer ends."""

from __future__ import annotations

import itertools
import math

import grpc
import pytest

from tests.e2e.harness import Client, chat, refused, some_tokens, text, token_ids
from warmkv import v1

TEMPERATURE = v1.SamplingParams(temperature=1.0)


def seeded(seed: int) -> v1.SamplingParams:
    return v1.SamplingParams(temperature=1.0, seed=seed)


def test_the_stream_is_started_then_deltas_then_finished(client: Client, agent: str) -> None:
    answer = client.generate(agent, text("Once upon a time"), max_tokens=12)
    kinds = [event.WhichOneof("event") for event in answer.events]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["started", "delta", "finished"]
    assert answer.started.agent_id == agent
    assert len(answer.tokens) == 12
    assert all(len(delta.token_ids) == 1 for delta in answer.deltas)
    finished = answer.finished
    assert finished.finish_reason == v1.FINISH_REASON_LENGTH
    assert finished.usage.completion_tokens == 12
    assert finished.usage.prompt_tokens == finished.cache.prompt_tokens
    assert finished.usage.cached_tokens == finished.cache.cached_tokens
    assert finished.agent.token_count == finished.usage.prompt_tokens + 12
    assert finished.agent.revision == 1
    assert finished.persisted
    assert finished.timings.first_token.ToNanoseconds() > 0
    assert finished.timings.decode.ToNanoseconds() > 0
    assert finished.timings.commit.ToNanoseconds() > 0


def test_an_unknown_agent_is_created_and_a_known_one_goes_on(client: Client, agent: str, seed: int) -> None:
    first = client.generate(agent, token_ids(some_tokens(100, seed)), max_tokens=5)
    second = client.generate(agent, token_ids([301, 302]), max_tokens=5)
    assert second.cache.prompt_tokens == 100 + 5 + 2
    assert second.cache.cached_tokens == 105  # of every one of the answer's tokens the KV was kept
    assert second.finished.agent.revision == 2
    whole = client.generate("", token_ids([*some_tokens(100, seed), *first.tokens, 301, 302]), max_tokens=5)
    assert whole.tokens == second.tokens


def test_without_content_it_goes_on_from_where_it_is(client: Client, agent: str, seed: int) -> None:
    client.prime(agent, token_ids(some_tokens(300, seed)))
    answer = client.generate(agent, max_tokens=6)
    assert (answer.cache.prompt_tokens, answer.cache.cached_tokens, answer.cache.prefilled_tokens) == (300, 299, 1)
    assert answer.finished.agent.token_count == 306
    fresh = client.generate("", token_ids(some_tokens(300, seed)), max_tokens=6)
    assert fresh.tokens == answer.tokens


@pytest.mark.parametrize("content", [None, text(""), token_ids([]), chat()], ids=["none", "text", "token_ids", "chat"])
def test_without_content_and_without_a_context_there_is_nothing_to_do(
    client: Client, agent: str, content: v1.Content | None
) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_CONTENT") as refusals:
        client.generate(agent, content)
    assert refusals[0].fields == ["content"]
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_CONTENT"):
        client.generate("", content)
    client.prime(agent, text("There is something now."))
    assert client.generate(agent, content).finished.agent.revision == 2
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_CONTENT"):
        client.generate(agent, content, context_mode=v1.CONTEXT_MODE_REPLACE)


def test_replace_makes_the_content_the_context(client: Client, agent: str, seed: int) -> None:
    tokens = some_tokens(400, seed)
    client.prime(agent, token_ids(tokens))
    answer = client.generate(
        agent, token_ids([*tokens[:350], 301, 302]), context_mode=v1.CONTEXT_MODE_REPLACE, max_tokens=3
    )
    assert (answer.cache.prompt_tokens, answer.cache.cached_tokens) == (352, 350)
    assert answer.finished.agent.token_count == 355


def test_ephemeral_changes_nothing(client: Client, agent: str, seed: int) -> None:
    before = client.prime(agent, token_ids(some_tokens(300, seed))).agent
    answer = client.generate(agent, text(" What if?"), ephemeral=True)
    assert not answer.finished.persisted
    assert answer.finished.agent.revision == 1
    after = client.get(agent)
    assert (after.token_count, after.revision, after.update_time) == (300, 1, before.update_time)
    assert client.generate(agent, text(" What if?"), ephemeral=True).tokens == answer.tokens
    assert client.generate(agent, text(" What if?")).tokens == answer.tokens


def test_ephemeral_on_an_unknown_agent_creates_none(client: Client, agent: str) -> None:
    answer = client.generate(agent, text("Hello"), ephemeral=True)
    assert answer.started.agent_id == agent
    assert not answer.finished.HasField("agent")
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        client.get(agent)


def test_without_an_agent_nothing_is_kept(client: Client, seed: int) -> None:
    agents = {agent.agent_id for agent in client.list(page_size=1000).agents}
    answer = client.generate("", token_ids(some_tokens(100, seed)))
    assert answer.started.agent_id == ""
    assert not answer.finished.HasField("agent")
    assert not answer.finished.persisted
    # Fewer, if one's time to live was over.
    assert {agent.agent_id for agent in client.list(page_size=1000).agents} <= agents
    assert client.generate("", token_ids(some_tokens(100, seed))).cache.source == v1.CACHE_SOURCE_COLD


def test_a_long_prompt_reports_its_progress(client: Client, agent: str, seed: int) -> None:
    answer = client.generate(agent, token_ids(some_tokens(1200, seed)), max_tokens=2)
    done = [progress.tokens_done for progress in answer.progress]
    assert done
    assert done == sorted(done)
    assert {progress.tokens_total for progress in answer.progress} == {1200}
    assert done[-1] <= 1200
    kinds = [event.WhichOneof("event") for event in answer.events]
    assert kinds.index("delta") > max(n for n, kind in enumerate(kinds) if kind == "prefill_progress")


def test_final_mode_sends_one_delta_with_the_whole_answer(client: Client, seed: int) -> None:
    content = token_ids(some_tokens(600, seed))
    streamed = client.generate("", content, max_tokens=20, top_logprobs=2)
    final = client.generate("", content, max_tokens=20, top_logprobs=2, stream_mode=v1.STREAM_MODE_FINAL)
    kinds = [event.WhichOneof("event") for event in final.events]
    assert kinds == ["started", "delta", "finished"]
    assert final.tokens == streamed.tokens
    assert final.text == streamed.text
    assert len(final.deltas[0].logprobs) == 20


def test_an_answer_ends_with_its_end_of_sequence(client: Client, agent: str) -> None:
    end = client.count(chat(("user", "x")), context_mode=v1.CONTEXT_MODE_REPLACE).token_ids
    bias = v1.SamplingParams(temperature=0)
    # The end-of-turn token stands in the template; with a bias it is what the model samples next.
    for candidate in dict.fromkeys(token for token in end if not 300 <= token < 3000):
        bias.logit_bias.clear()
        bias.logit_bias[candidate] = 100
        answer = client.generate(agent, text("Hello"), sampling=bias, ignore_eos=False, max_tokens=4)
        if answer.finished.finish_reason == v1.FINISH_REASON_STOP:
            break
        client.delete(agent)
    else:
        pytest.fail("no token of the template ends a sequence")
    assert answer.tokens == [candidate]
    assert answer.text == ""
    assert answer.finished.usage.completion_tokens == 1
    assert answer.finished.agent.token_count == answer.cache.prompt_tokens + 1
    on = client.generate(agent, text(" more"), sampling=bias, ignore_eos=True, max_tokens=4)
    assert on.finished.finish_reason == v1.FINISH_REASON_LENGTH
    assert on.tokens == [candidate] * 4


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: Client, agent: str, seed: int) -> None:
    content = token_ids(some_tokens(50, seed))
    free = client.generate("", content, max_tokens=40)
    assert len(free.text) > 12
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 4]
    cut = free.text.index(stop)
    answer = client.generate(agent, content, max_tokens=40, stop=["never said\x00", stop])
    assert answer.text == free.text[:cut]
    assert answer.finished.finish_reason == v1.FINISH_REASON_STOP_SEQUENCE
    assert answer.finished.matched_stop == stop
    kept = answer.finished.usage.completion_tokens
    assert answer.finished.agent.token_count == 50 + kept
    assert answer.tokens[:kept] == free.tokens[:kept]
    assert client.generate(agent).cache.cached_tokens == 50 + kept - 1


def test_held_back_text_is_released_at_the_end(client: Client, seed: int) -> None:
    content = token_ids(some_tokens(50, seed))
    free = client.generate("", content, max_tokens=12)
    almost = free.text[-3:] + "\x00"
    answer = client.generate("", content, max_tokens=12, stop=[almost])
    assert answer.text == free.text
    assert answer.tokens == free.tokens


def test_logprobs_are_reported_for_each_token(client: Client, seed: int) -> None:
    answer = client.generate("", token_ids(some_tokens(50, seed)), max_tokens=6, top_logprobs=5)
    logprobs = [each for delta in answer.deltas for each in delta.logprobs]
    assert [each.token_id for each in logprobs] == answer.tokens
    for each in logprobs:
        assert len(each.top) == 5
        values = [top.logprob for top in each.top]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1.0001
        # Greedy: the token is the likeliest.
        assert each.top[0].token_id == each.token_id
        assert each.logprob == pytest.approx(values[0], abs=1e-5)
    assert not any(delta.logprobs for delta in client.generate("", text("x")).deltas)


def test_a_seed_makes_sampling_repeatable(client: Client, seed: int) -> None:
    content = token_ids(some_tokens(50, seed))
    first = client.generate("", content, sampling=seeded(7), max_tokens=16)
    assert client.generate("", content, sampling=seeded(7), max_tokens=16).tokens == first.tokens
    assert client.generate("", content, sampling=seeded(2**64 - 1), max_tokens=16).tokens != first.tokens
    unseeded = {tuple(client.generate("", content, sampling=TEMPERATURE, max_tokens=16).tokens) for _ in range(3)}
    assert len(unseeded) > 1


def test_what_is_unset_takes_the_servers_defaults(client: Client, seed: int) -> None:
    info = client.info()
    assert info.sampling_defaults.HasField("temperature")
    assert not info.sampling_defaults.HasField("seed")
    explicit = v1.SamplingParams()
    explicit.CopyFrom(info.sampling_defaults)
    explicit.seed = 3
    content = token_ids(some_tokens(50, seed))
    by_default = client.generate("", content, sampling=v1.SamplingParams(seed=3), max_tokens=12)
    assert client.generate("", content, sampling=explicit, max_tokens=12).tokens == by_default.tokens
    long = client.generate("", content, max_tokens=0)
    assert len(long.tokens) == info.default_max_tokens


def test_chat_turns_compute_only_what_is_new(client: Client, agent: str) -> None:
    first = client.generate(agent, chat(("system", "Be brief."), ("user", "What is a tree?")), max_tokens=10)
    held = first.finished.agent.token_count
    second = client.generate(agent, chat(("user", "And a bush?")), max_tokens=10)
    assert second.cache.cached_tokens == held
    assert second.cache.prefilled_tokens < 40
    assert client.get(agent).revision == 2


def test_one_bos_at_the_start_and_none_in_the_middle(client: Client, agent: str) -> None:
    started = list(client.count(text("Hello")).token_ids)
    client.prime(agent, text("Hello"))
    appended = list(client.count(text(" world"), agent_id=agent).token_ids)
    assert client.extend(agent, text(" world")).agent.token_count == len(started) + len(appended)
    bare = list(client.count(text(" world"), agent_id=agent, context_mode=v1.CONTEXT_MODE_REPLACE).token_ids)
    bos = bare[: len(bare) - len(appended)]
    assert bare == [*bos, *appended]
    assert started[: len(bos)] == bos
    assert not set(bos) & set(appended)


def test_count_tokens_counts_what_generate_makes(client: Client, agent: str) -> None:
    for content in (text("Some text."), chat(("user", "A question?")), token_ids([301, 302])):
        counted = client.count(content)
        assert counted.token_count == len(counted.token_ids)
        assert client.generate("", content, max_tokens=1).cache.prompt_tokens == counted.token_count
    held = client.prime(agent, chat(("user", "First."))).agent.token_count
    more = client.count(chat(("user", "Second.")), agent_id=agent)
    answer = client.generate(agent, chat(("user", "Second.")), max_tokens=1, ephemeral=True)
    assert answer.cache.prompt_tokens == held + more.token_count
    request = v1.CountTokensRequest(content=text("x"))
    assert not client.server.CountTokens(request).token_ids
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        client.count(text("x"), agent_id=f"{agent}-2")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_CONTENT"):
        client.count(None)
