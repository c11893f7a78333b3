"""Answers that are held to a schema, an expression, a grammar or a choice, over a real socket."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from tests.e2e.harness import Answer, Client, chat, refusal_of, refused, serving, text
from tests.e2e.schemas import ENFORCED, PERSON, REFUSED
from warmkv import v1

AS_IT_COMES = v1.SamplingParams(temperature=1.0, seed=1)
SEEDS = range(3)
STOP, LENGTH = v1.FINISH_REASON_STOP, v1.FINISH_REASON_LENGTH
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def schema(value: Any) -> v1.ResponseFormat:
    return v1.ResponseFormat(json_schema=value if isinstance(value, str) else json.dumps(value))


def choices(*texts: str) -> v1.ResponseFormat:
    return v1.ResponseFormat(choices=v1.Choices(texts=texts))


def ask(client: Client, wanted: v1.ResponseFormat, agent: str = "", **fields: Any) -> Answer:
    fields.setdefault("max_tokens", 160)
    question = chat(("user", "Tell me about a cat."))
    return client.generate(agent, question, response_format=wanted, ignore_eos=False, **fields)


def sampled(client: Client, wanted: v1.ResponseFormat, seeds: Sequence[int] = SEEDS, **fields: Any) -> list[Answer]:
    return [ask(client, wanted, sampling=v1.SamplingParams(temperature=1.0, seed=seed), **fields) for seed in seeds]


def validator_of(value: Any) -> Any:
    """One that looks at formats too."""
    own = {k: v for k, v in value.items() if k != "$schema"} if isinstance(value, dict) else value
    return Draft202012Validator(own, format_checker=Draft202012Validator.FORMAT_CHECKER)


def test_every_keyword_that_is_taken_is_kept_to(client: Client) -> None:
    """All at once, so that rows of many grammars are in one batch."""
    ended: dict[str, int] = {}
    with ThreadPoolExecutor(12) as threads:
        answers = {name: threads.submit(sampled, client, schema(value)) for name, value in ENFORCED.items()}
        free = threads.submit(client.generate, "", text("Once upon a time"), max_tokens=200)
        for name, got in answers.items():
            validator = validator_of(ENFORCED[name])
            complete = [answer for answer in got.result() if answer.finished.finish_reason == STOP]
            for answer in complete:
                validator.validate(json.loads(answer.text))
            ended[name] = len(complete)
        assert len(free.result().tokens) == 200
    assert all(ended.values()), ended


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_keyword_that_is_not_is_named(client: Client, keyword: str) -> None:
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
        ask(client, schema(REFUSED[keyword]))
    assert keyword.split()[0] in found[0].message


def test_expressions_grammars_and_choices(client: Client) -> None:
    plate = r"[A-Z]{2}-[0-9]{3}( \((old|new)\))?"
    for answer in sampled(client, v1.ResponseFormat(regex=plate)):
        assert answer.finished.finish_reason == STOP
        assert re.fullmatch(plate, answer.text)
        assert answer.tokens[-1] in {end.token_id for end in client.info().end_tokens}
    sums = 'start: NUMBER (" + " NUMBER)+ " = " NUMBER\nNUMBER: /[1-9][0-9]?/'
    for answer in sampled(client, v1.ResponseFormat(lark=sums)):
        if answer.finished.finish_reason == STOP:
            assert re.fullmatch(r"\d+( \+ \d+)+ = \d+", answer.text)
    texts = ["yes", "no", "(.*) [a-z]+ &~# \\d", "vielleicht, süß", "line\nend"]
    for text_ in texts:
        assert ask(client, choices(text_)).text == text_
    assert {answer.text for answer in sampled(client, choices(*texts), range(12))} <= set(texts)


@pytest.mark.parametrize(
    ("wanted", "reason", "field"),
    [
        (schema("{"), "INVALID_FIELD", "response_format.json_schema"),
        (schema({"type": "person"}), "INVALID_FIELD", "response_format.json_schema"),
        (schema({"$ref": "#/$defs/nothing"}), "INVALID_FIELD", "response_format.json_schema"),
        (schema({"$ref": "#"}), "INVALID_FIELD", "response_format.json_schema"),
        (schema(False), "INVALID_FIELD", "response_format.json_schema"),
        (schema({"type": "string", "pattern": "("}), "INVALID_FIELD", "response_format.json_schema"),
        (schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "INVALID_FIELD", "response_format.json_schema"),
        (v1.ResponseFormat(regex="(a"), "INVALID_FIELD", "response_format.regex"),
        (v1.ResponseFormat(regex="[a&&b]"), "INVALID_FIELD", "response_format.regex"),
        (v1.ResponseFormat(lark="begin: /a/"), "INVALID_FIELD", "response_format.lark"),
        (v1.ResponseFormat(), "INVALID_FIELD", "response_format"),
        (choices(), "INVALID_FIELD", "response_format.choices.texts"),
        (choices("a", ""), "INVALID_FIELD", "response_format.choices.texts"),
        (choices("a", "a"), "INVALID_FIELD", "response_format.choices.texts"),
        (schema({"properties": {f"p{n}": {} for n in range(2001)}}), "CONSTRAINT_TOO_COMPLEX", None),
        (schema({"enum": list(range(5001))}), "CONSTRAINT_TOO_COMPLEX", None),
        (schema('{"items":' * 110 + "{}" + "}" * 110), "CONSTRAINT_TOO_COMPLEX", None),
        (v1.ResponseFormat(lark="start: " + ' | "a"' * 5002), "CONSTRAINT_TOO_COMPLEX", None),
    ],
    ids=str,
)
def test_what_is_wrong_by_itself_is_refused_before_anything_is_computed(
    client: Client, agent: str, wanted: v1.ResponseFormat, reason: str, field: str | None
) -> None:
    with refused(INVALID, reason) as found:
        ask(client, wanted, agent)
    assert found[0].fields[:1] == ([field] if field else [])
    with refused(grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND"):
        client.get(agent)


def test_where_it_ends_is_not_for_two_to_say(client: Client) -> None:
    with refused(INVALID, "INVALID_FIELD") as found:
        client.generate("", text("a"), response_format=choices("a"), ignore_eos=True)
    assert found[0].fields == ["ignore_eos"]


def test_an_answer_can_end_within_a_sentence(client: Client) -> None:
    short = ask(client, schema(PERSON), max_tokens=5)
    assert (short.finished.finish_reason, len(short.tokens)) == (LENGTH, 5)
    whole = ask(client, schema(PERSON))
    assert whole.tokens[:5] == short.tokens
    stopped = ask(client, schema(PERSON), stop=['"age"'])
    assert stopped.finished.finish_reason == v1.FINISH_REASON_STOP_SEQUENCE
    assert whole.text.startswith(stopped.text)


def test_what_runs_out_in_mid_answer_is_kept_as_if_cancelled(client: Client, agent: str) -> None:
    """Each step has more to remember than the one before."""
    ambiguous = v1.ResponseFormat(lark='start: s\ns: s s s | "a" | "aa" | ')
    request = client.stream(agent, text("aaaa"), response_format=ambiguous, max_tokens=4000, request_id=f"{agent}-1")
    events = []
    with pytest.raises(grpc.RpcError) as caught:
        events.extend(request)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CONSTRAINT_TOO_COMPLEX")
    kept = client.get(agent)
    assert kept.revision == 1
    assert kept.token_count > client.count(text("aaaa")).token_count + 20
    again = client.generate(agent, text(" and"), max_tokens=2)
    assert again.cache.prefilled_tokens <= client.count(text(" and")).token_count + 1


def test_hot_and_warm_and_with_others_it_is_the_same(client: Client, agent: str) -> None:
    """Also reported: the model's own probabilities, whatever the grammar leaves of them."""
    asked: dict[str, Any] = {"sampling": AS_IT_COMES, "ephemeral": True, "top_logprobs": 2}
    client.prime(agent, text("Reports on animals: "))
    hot = ask(client, schema(PERSON), agent, **asked)
    client.evict(agent)
    warm = ask(client, schema(PERSON), agent, **asked)
    assert warm.cache.source == v1.CACHE_SOURCE_WARM
    assert (warm.tokens, warm.text) == (hot.tokens, hot.text)
    told = [each for delta in hot.deltas for each in delta.logprobs]
    assert [each.token_id for each in told] == hot.tokens
    assert any(each.token_id not in [top.token_id for top in each.top] for each in told)


def test_forcing_changes_no_token(tmp_path: Path) -> None:
    spoken = schema(
        {
            "type": "object",
            "properties": {name: {"type": "boolean"} for name in ("has_long_whiskers", "is_an_elephant", "sleeps")},
            "required": ["has_long_whiskers", "is_an_elephant", "sleeps"],
            "additionalProperties": False,
        }
    )
    exact = ("--kv-bits", "0")  # a value that rounding moves to the next of 16 moves a logit by a tenth
    with (
        serving(tmp_path / "forced", *exact) as (_, forcing),
        serving(tmp_path / "plain", *exact, "--force-tokens", "0") as (_, plain),
    ):
        for wanted in (spoken, schema(PERSON), choices("a rather long text that nobody would guess", "b")):
            for sampling in (None, AS_IT_COMES):
                forced, one_by_one = (ask(each, wanted, sampling=sampling) for each in (forcing, plain))
                assert forced.tokens == one_by_one.tokens
                assert one_by_one.finished.usage.forced_tokens == 0
                assert 0 < forced.finished.usage.forced_tokens < len(forced.tokens)
                assert [len(delta.token_ids) for delta in forced.deltas] == [1] * len(forced.tokens)


def test_an_agent_goes_on_behind_it(client: Client, agent: str) -> None:
    """Forced tokens have their KV as others do."""
    first = ask(client, schema(PERSON), agent, request_id=f"{agent}-1")
    held = first.finished.agent.token_count
    assert held == first.cache.prompt_tokens + len(first.tokens)
    replayed = ask(client, schema(PERSON), agent, request_id=f"{agent}-1")
    assert (replayed.text, replayed.finished) == (first.text, first.finished)
    question = chat(("user", "And a dog?"))
    new = client.count(question, agent_id=agent)
    second = client.generate(agent, question, max_tokens=4)
    assert second.cache.cached_tokens == held - new.replaced_tokens
