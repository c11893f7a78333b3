"""What OpenAI's and Anthropic's own clients ask for, and what they are refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.harness import chat, text
from tests.gateway.harness import MODEL, Gateway, Worker, user

SEA = "Tell me about the sea."
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}]


def said(answer: Any) -> list[str]:
    return [choice.message.content for choice in answer.choices]


def test_the_model_has_a_name(front: Gateway) -> None:
    assert [model.id for model in front.openai.models.list()] == [MODEL]


def test_a_chat_says_the_same_in_pieces_and_as_our_own_api(front: Gateway, worker: Worker) -> None:
    whole = front.chat(user(SEA))
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (16, "length")
    pieces = list(front.chat(user(SEA), stream=True, stream_options={"include_usage": True}))
    texts = [choice.delta.content or "" for piece in pieces for choice in piece.choices]
    assert sum(map(bool, texts)) > 8
    assert "".join(texts) == said(whole)[0]
    assert pieces[-1].usage.completion_tokens == 16
    ours = worker.own.generate("", chat(("user", SEA)), max_tokens=16, ignore_eos=False)
    assert ours.text == said(whole)[0]


def test_completions_and_several_prompts(front: Gateway) -> None:
    create = front.openai.completions.create
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    both = [choice.text for choice in create(prompt=["The sea is", "A dog"], **asked).choices]
    assert len(both) == 2
    pieces = [piece.choices[0].text for piece in create(prompt="The sea is", stream=True, **asked) if piece.choices]
    assert "".join(pieces) == both[0]


def test_responses(front: Gateway) -> None:
    create = front.openai.responses.create
    whole = create(model=MODEL, input=SEA, max_output_tokens=8, temperature=0)
    events = list(create(model=MODEL, input=SEA, max_output_tokens=8, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert whole.output_text


def test_messages(front: Gateway) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "messages": user(SEA), "extra_body": {"temperature": 0}}
    whole = front.anthropic.messages.create(**asked)
    assert whole.usage.output_tokens == 8
    with front.anthropic.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    asked["max_tokens"] = 400
    tool = {"name": "weather", "description": "Of a city.", "input_schema": CITY}
    (call,) = front.anthropic.messages.create(
        **asked, tools=[tool], tool_choice={"type": "tool", "name": "weather"}
    ).content
    assert (call.type, call.name, list(call.input)) == ("tool_use", "weather", ["city"])


def test_several_answers(front: Gateway) -> None:
    answers = said(front.chat(user(SEA), n=3, temperature=1.5, seed=4, max_tokens=24))
    assert len(answers) == 3
    assert len(set(answers)) > 1
    pieces = list(front.chat(user(SEA), n=2, stream=True))
    assert {choice.index for piece in pieces for choice in piece.choices} == {0, 1}


def test_what_ends_an_answer(front: Gateway, worker: Worker) -> None:
    (choice,) = front.chat(user(SEA), stop=["sea", "nowhere"]).choices
    assert (choice.message.content, choice.finish_reason) == ("The ", "stop")
    (sea,) = worker.own.count(text(" sea")).token_ids[-1:]
    stopped = front.chat(user(SEA), extra_body={"stop_token_ids": [sea]})
    assert (stopped.usage.completion_tokens, stopped.choices[0].finish_reason) == (2, "stop")
    assert "sea" not in stopped.choices[0].message.content


def test_how_probable_an_answer_is(front: Gateway) -> None:
    content = front.chat(user(SEA), max_tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [token.token for token in content] == ["The", " sea", " is"]
    for token in content:
        assert token.logprob <= 0
        assert [token.token, token.logprob] == [token.top_logprobs[0].token, token.top_logprobs[0].logprob]
        assert len(token.top_logprobs) == 2


def test_a_seed_repeats(front: Gateway) -> None:
    one, again, other = (said(front.chat(user(SEA), temperature=1.5, seed=seed)) for seed in (7, 7, 8))
    assert one == again
    assert one != other


def test_an_answer_is_of_a_form(front: Gateway) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    (told,) = said(front.chat(user(SEA), max_tokens=400, response_format=schema))
    assert json.loads(told).keys() == {"name", "age"}
    (told,) = said(front.chat(user(SEA), max_tokens=400, response_format={"type": "json_object"}))
    assert isinstance(json.loads(told), dict)
    assert said(front.chat(user(SEA), extra_body={"regex": "(yes|no)7"})) in (["yes7"], ["no7"])
    assert said(front.chat(user(SEA), extra_body={"ebnf": 'root ::= "ja" | "nein"'})) in (["ja"], ["nein"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_are_called(front: Gateway, choice: Any) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400}
    (whole,) = front.chat(user(SEA), **asked).choices
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather"
    assert list(json.loads(call.function.arguments)) == ["city"]
    deltas = [c.delta for piece in front.chat(user(SEA), stream=True, **asked) for c in piece.choices]
    parts = [part.function for delta in deltas for part in delta.tool_calls or []]
    assert [part.name for part in parts if part.name] == ["weather"]
    assert json.loads("".join(part.arguments or "" for part in parts)) == json.loads(call.function.arguments)


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("sampling_params.regex", {"extra_body": {"regex": "(yes|no"}}),
        ("sampling_params.grammar", {"extra_body": {"ebnf": "root ::= (((("}}),
        (
            "sampling_params.json_schema",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
        ),
    ],
)
def test_a_refusal_says_why(front: Gateway, field: str, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=field.replace(".", r"\.")):
        front.chat(user(SEA), **more)


def test_a_refusal_of_a_completion_says_why(front: Gateway) -> None:
    with pytest.raises(openai.BadRequestError, match="min_tokens must be 0"):
        front.openai.completions.create(model=MODEL, prompt="a", extra_body={"min_tokens": 2})


def test_an_agent_has_one_context(front: Gateway) -> None:
    with pytest.raises(openai.BadRequestError, match="must be 1 for a named agent"):
        front.chat(user(SEA), "several", n=2)


def test_too_long_is_told_as_openai_does(front: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        front.chat(user("word " * 40_000))
    assert caught.value.code == "context_length_exceeded"
