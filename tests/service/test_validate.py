"""The limits of fields: at the limit it is taken, above it is named, and no refusal is larger than a status may be."""

from __future__ import annotations

from typing import Any

import pytest

from warmkv import v1
from warmkv_server.errors import ContextTooLong, InvalidField
from warmkv_server.service import limits, validate
from warmkv_server.service.errors import status_of
from warmkv_server.service.validate import Model

MODEL = Model(vocab_size=4096, context_limit=100)
HI = v1.Content(text="hi")


def refused(**fields: Any) -> InvalidField:
    with pytest.raises(InvalidField) as caught:
        validate.generate(v1.GenerateRequest(**{"content": HI, **fields}), MODEL)
    return caught.value


@pytest.mark.parametrize(
    ("at_limit", "above", "field"),
    [
        ({"stop": ["x"] * 16}, {"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 256]}, {"stop": ["x" * 257]}, "stop[0]"),
        ({"stop": ["x" * 256] * 8}, {"stop": ["x" * 256] * 8 + ["x"]}, "stop"),
        ({"top_logprobs": 20}, {"top_logprobs": 21}, "top_logprobs"),
        (
            {"sampling": v1.SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0))},
            {"sampling": v1.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))},
            "sampling.logit_bias",
        ),
        (
            {"content": v1.Content(chat=v1.ChatMessages(messages=[v1.ChatMessage(role="r" * 64)]))},
            {"content": v1.Content(chat=v1.ChatMessages(messages=[v1.ChatMessage(role="r" * 65)]))},
            "content.chat.messages[0].role",
        ),
    ],
)
def test_limits_of_a_field(at_limit: dict[str, Any], above: dict[str, Any], field: str) -> None:
    validate.generate(v1.GenerateRequest(**{"content": HI, **at_limit}), MODEL)
    (violation,) = refused(**above).violations
    assert violation.field == field


def test_a_refusal_names_twenty_fields_and_counts_the_rest() -> None:
    messages = [v1.ChatMessage(content="no role")] * 8000
    refusal = refused(content=v1.Content(chat=v1.ChatMessages(messages=messages)), max_tokens=-1)
    assert len(refusal.violations) == limits.VIOLATIONS + 1
    assert refusal.violations[-1].description.startswith(f"{8001 - limits.VIOLATIONS} more")
    status = status_of(refusal)
    assert sum(len(value) for _, value in status.trailing_metadata) + len(status.message) < 8192


def test_ids_out_of_range_are_counted_without_being_named() -> None:
    ids = [5, -1, 4095, *[4096] * 60]
    refusal = refused(content=v1.Content(token_ids=v1.TokenIds(ids=ids)))
    assert refusal.violations[0].field == "content.token_ids.ids[1]"
    assert refusal.violations[1].field == "content.token_ids.ids[3]"
    assert refusal.violations[-1].description.startswith("41 more")


def test_more_ids_than_a_context_holds_are_not_looked_at() -> None:
    too_many = v1.Content(token_ids=v1.TokenIds(ids=[9999] * 101))
    with pytest.raises(ContextTooLong, match="101"):
        validate.prime(v1.PrimeRequest(agent_id="a", content=too_many), MODEL)
    with pytest.raises(InvalidField):
        validate.count_tokens(v1.CountTokensRequest(content=too_many), MODEL)


def test_filters_and_masks_have_the_limits_of_what_they_look_for() -> None:
    with pytest.raises(InvalidField, match="labels"):
        validate.list_agents(v1.ListAgentsRequest(labels={str(n): "" for n in range(65)}))
    request = v1.UpdateAgentRequest(agent=v1.Agent(agent_id="a"))
    request.update_mask.paths.extend(["pinned"] * 17)
    with pytest.raises(InvalidField, match="16 paths"):
        validate.update(request)
