"""What is refused of a message's bytes before a message is made of them, and that nothing else is."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from warmkv import v1
from warmkv_server.errors import ContextTooLong, InvalidField, MalformedMessage
from warmkv_server.service import limits
from warmkv_server.service.wire import refusal

KINDS: list[type[Message]] = [
    v1.PrimeRequest,
    v1.ExtendRequest,
    v1.GenerateRequest,
    v1.ForkAgentRequest,
    v1.EvictAgentRequest,
    v1.GetAgentRequest,
    v1.ListAgentsRequest,
    v1.UpdateAgentRequest,
    v1.DeleteAgentRequest,
    v1.CountTokensRequest,
    v1.GetServerInfoRequest,
    v1.GetServerStatsRequest,
]


def largest() -> v1.GenerateRequest:
    """Everything at its limit."""
    message = v1.ChatMessage(role="r" * limits.ROLE_CHARACTERS, content="content")
    return v1.GenerateRequest(
        agent_id="a" * 128,
        content=v1.Content(chat=v1.ChatMessages(messages=[message] * limits.CHAT_MESSAGES)),
        sampling=v1.SamplingParams(logit_bias=dict.fromkeys(range(limits.LOGIT_BIASES), 1.0), seed=1, temperature=1),
        stop=["\U0001f600" * limits.STOP_CHARACTERS] * limits.STOPS,
        request_id="\U0001f600" * limits.REQUEST_ID_CHARACTERS,
    )


def test_a_message_at_its_limits_is_taken() -> None:
    assert refusal(largest().SerializeToString(), v1.GenerateRequest) is None
    ids = v1.TokenIds(ids=[300] * limits.TOKEN_IDS)
    request = v1.ExtendRequest(agent_id="a", content=v1.Content(token_ids=ids))
    assert refusal(request.SerializeToString(), v1.ExtendRequest) is None
    labels = {f"{'k' * 60}{n:03}": "v" * 255 for n in range(limits.LABELS)}
    agent = v1.UpdateAgentRequest(agent=v1.Agent(agent_id="a", labels=labels))
    agent.update_mask.paths.extend(["labels"] * limits.UPDATE_PATHS)
    assert refusal(agent.SerializeToString(), v1.UpdateAgentRequest) is None


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (v1.GenerateRequest(agent_id="a" * 70_000), "agent_id"),
        (v1.GenerateRequest(stop=["a", "b" * 70_000]), "stop[1]"),
        (v1.GenerateRequest(stop=["a"] * 1025), "stop"),
        (v1.GenerateRequest(sampling=v1.SamplingParams(logit_bias=dict.fromkeys(range(1025), 0.5))), "logit_bias"),
        (v1.PrimeRequest(labels={str(n): "" for n in range(1025)}), "labels"),
        (v1.PrimeRequest(labels={"key": "v" * 70_000}), "labels.value"),
        (v1.ListAgentsRequest(page_token="x" * 70_000), "page_token"),
        (
            v1.CountTokensRequest(content=v1.Content(token_ids=v1.TokenIds(ids=[7] * 2_097_153))),
            "content.token_ids.ids",
        ),
        (
            v1.PrimeRequest(
                content=v1.Content(chat=v1.ChatMessages(messages=[v1.ChatMessage(content="hi", role="r" * 70_000)]))
            ),
            "content.chat.messages[0].role",
        ),
        (
            v1.PrimeRequest(content=v1.Content(chat=v1.ChatMessages(messages=[v1.ChatMessage()] * 8193))),
            "content.chat.messages",
        ),
    ],
)
def test_what_is_over_a_limit_is_named(request_: Message, field: str) -> None:
    refused = refusal(request_.SerializeToString(), type(request_))
    assert isinstance(refused, InvalidField)
    (violation,) = refused.violations
    assert violation.field.removeprefix("sampling.") == field


def test_content_is_counted_in_all_its_parts() -> None:
    messages = [v1.ChatMessage(role="user", content="x" * 10)] * 10
    request = v1.GenerateRequest(content=v1.Content(chat=v1.ChatMessages(messages=messages)))
    data = request.SerializeToString()
    assert refusal(data, v1.GenerateRequest, 100) is None
    assert isinstance(refusal(data, v1.GenerateRequest, 99), ContextTooLong)
    data = v1.GenerateRequest(content=v1.Content(text="é" * 50)).SerializeToString()
    assert refusal(data, v1.GenerateRequest, 100) is None
    assert isinstance(refusal(data, v1.GenerateRequest, 99), ContextTooLong)


def test_fields_that_nobody_knows_are_counted_too() -> None:
    unknown = b"\x78\x00"  # number 15
    assert refusal(unknown * limits.MESSAGE_FIELDS, v1.GetAgentRequest) is None
    assert isinstance(refusal(unknown * (limits.MESSAGE_FIELDS + 1), v1.GetAgentRequest), InvalidField)


def test_groups_are_malformed() -> None:
    assert isinstance(refusal(b"\x7b\x7c", v1.GetAgentRequest), MalformedMessage)


@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_any_bytes_are_looked_through(kind: type[Message], data: bytes) -> None:
    """Nothing breaks, and what decodes and is this small is let through, unless it has groups."""
    refused = refusal(data, kind)
    if refused is not None:
        assert isinstance(refused, MalformedMessage)
    try:
        kind.FromString(data)
    except DecodeError:
        return


@given(st.text(max_size=60), st.text(max_size=60), st.lists(st.text(max_size=9), max_size=9))
def test_ordinary_messages_pass(agent_id: str, request_id: str, stop: list[str]) -> None:
    request = v1.GenerateRequest(agent_id=agent_id, request_id=request_id, stop=stop)
    assert refusal(request.SerializeToString(), v1.GenerateRequest, 100) is None
