"""Answers that must call, must not, or call with arguments as their schema says, over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.harness import Answer, Client, refused, serving
from tests.e2e.test_tools import TEMPLATE, asked, opened, result, user
from tests.engine.parrot import write_speaker
from warmkv import v1

REQUIRED, NONE = v1.TOOL_CHOICE_MODE_REQUIRED, v1.TOOL_CHOICE_MODE_NONE
VALID = v1.TOOL_CALL_STATUS_VALID
CALLED, STOP, LENGTH = v1.FINISH_REASON_TOOL_CALLS, v1.FINISH_REASON_STOP, v1.FINISH_REASON_LENGTH
BARE = """\
{%- for tool in tools or [] -%}{{ tool | tojson }}{%- endfor -%}
{%- for m in messages -%}<|{{ m.role }}|>
{%- if m.tool_calls -%}{%- if m.tool_calls | length > 1 -%}{{ raise_exception("one call") }}{%- endif -%}
{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}
{%- else -%}{{ m.content }}{%- endif -%}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
CODER = TEMPLATE.replace(
    '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}',
    "<function={{ call.function.name }}>{% for name, value in call.function.arguments.items() %}\n"
    "<parameter={{ name }}>\n{{ value if value is string else value | tojson }}\n</parameter>{% endfor %}\n</function>",
)
FORCING, ONE_BY_ONE = ("--kv-bits", "0"), ("--kv-bits", "0", "--force-tokens", "0")


def tool(name: str, strict: bool = True, **properties: Any) -> v1.Tool:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return v1.Tool(name=name, parameters_json=json.dumps(schema), strict=strict)


WEATHER = tool("weather", place={"enum": ["Uri", "Zug"]}, days={"type": "integer", "minimum": 1, "maximum": 3})
CLOCK = tool("clock")
TOOLS = [WEATHER, CLOCK]


def folder_of(path: Path, template: str) -> str:
    """A model that begins a call where it may, and draws the rest."""
    write_speaker(path, template, [("<|assistant|>", "<tool_call>", "</tool_call>"), ("<think>", "</think>")])
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp("models") / "speaker", TEMPLATE)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, folder: str) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("forcing") / "data", "--model", folder, *FORCING) as (_, client):
        yield client


def choose(mode: v1.ToolChoiceMode.ValueType = v1.TOOL_CHOICE_MODE_AUTO, *names: str, most: int = 0) -> v1.ToolChoice:
    return v1.ToolChoice(mode=mode, allowed_names=names, max_calls=most)


def ask(client: Client, agent: str = "", content: v1.Content | None = None, seed: int = 1, **fields: Any) -> Answer:
    fields = {"max_tokens": 120, "ignore_eos": False, "sampling": drawing(seed)} | fields
    return client.generate(agent, content or asked(user("Weather?"), tools=TOOLS), **fields)


def drawing(seed: int, ending: int = 1, temperature: float = 1.0) -> v1.SamplingParams:
    """As it comes, but for one token, by default the end, that comes soon where it may."""
    return v1.SamplingParams(temperature=temperature, seed=seed, logit_bias={ending: 9})


def called(answer: Answer) -> list[str]:
    """The tools that were called, all of them as they should be."""
    calls = list(answer.finished.tool_calls)
    if answer.finished.finish_reason == LENGTH:
        calls = calls[:-1]  # which it may have ended in
    else:
        assert answer.finished.finish_reason == (CALLED if calls else STOP)
    assert all(each.status == VALID for each in calls), calls
    return [each.call.name for each in calls]


def reasoning(answer: Answer) -> str:
    return "".join(delta.reasoning for delta in answer.deltas)


def test_what_may_be_called_is_as_it_was_chosen(client: Client) -> None:
    for seed in range(3):
        answer = ask(client, tool_choice=choose(REQUIRED, most=2), seed=seed)
        assert 1 <= len(called(answer)) <= 2
        assert not answer.text
        for name in ("weather", "clock"):
            assert called(ask(client, tool_choice=choose(REQUIRED, name, most=1), seed=seed)) == [name]
        # Left to itself the model begins a call.
        assert set(called(ask(client, tool_choice=choose(v1.TOOL_CHOICE_MODE_AUTO, "clock"), seed=seed))) <= {"clock"}
        silent = ask(client, tool_choice=choose(NONE), seed=seed)
        assert not silent.finished.tool_calls
        assert "<tool_call>" not in silent.text


def test_strict_arguments_are_as_their_schema_says_without_being_chosen(client: Client) -> None:
    greedy = v1.SamplingParams(temperature=0)
    assert called(ask(client, sampling=greedy))[:1] != []
    loose = asked(user("Weather?"), tools=[tool("weather", False, place={"enum": ["Uri"]})])
    statuses = {
        call.status
        for seed in range(4)
        for call in ask(client, content=loose, seed=seed, tool_choice=choose(REQUIRED, most=1)).finished.tool_calls
    }
    assert statuses <= {VALID, v1.TOOL_CALL_STATUS_SCHEMA_MISMATCH, v1.TOOL_CALL_STATUS_INCOMPLETE}
    assert statuses != {VALID}  # nobody holds those to it


def test_strict_stays_with_the_agent_and_can_change(client: Client, agent: str) -> None:
    first = ask(client, agent, tool_choice=choose(REQUIRED, "weather", most=1))
    told = result(first.finished.tool_calls[0].call.id, "Rain.")
    assert called(ask(client, agent, asked(told), tool_choice=choose(REQUIRED, "weather", most=1))) == ["weather"]
    held = client.get(agent).token_count
    unbound = [v1.Tool(name=each.name, parameters_json=each.parameters_json) for each in TOOLS]
    answer = ask(client, agent, asked(user("And?"), tools=unbound), tool_choice=choose(NONE), max_tokens=2)
    assert answer.cache.cached_tokens == held


def test_forcing_changes_no_token_nor_do_others_beside_it(tmp_path: Path, folder: str, client: Client) -> None:
    wanted: list[dict[str, Any]] = [
        {"tool_choice": choose(REQUIRED, most=2)},
        {"tool_choice": choose(REQUIRED, "weather", most=1), "seed": 5},
        {"seed": 7},
        {"response_format": v1.ResponseFormat(choices=v1.Choices(texts=["yes, it rains", "no"])), "seed": 3},
    ]
    alone = [ask(client, **each) for each in wanted]
    assert sum(answer.finished.usage.forced_tokens for answer in alone) > 10
    with serving(tmp_path / "data", "--model", folder, *ONE_BY_ONE) as (_, plain):
        for answer, each in zip(alone, wanted, strict=True):
            one_by_one = ask(plain, **each)
            assert one_by_one.finished.usage.forced_tokens == 0
            assert one_by_one.tokens == answer.tokens
    with ThreadPoolExecutor(len(wanted) + 1) as threads:
        free = threads.submit(client.generate, "", asked(user("Hi")), max_tokens=200)
        beside = [threads.submit(ask, client, **each) for each in wanted]
        for answer, other in zip(alone, beside, strict=True):
            assert other.result().tokens == answer.tokens
        assert len(free.result().tokens) == 200


def test_each_candidate_calls(client: Client) -> None:
    answer = ask(client, tool_choice=choose(REQUIRED, most=1), candidates=3)
    for each in answer.finished.candidates:
        assert [call.status for call in each.tool_calls] == [VALID]


def test_a_format_begins_behind_the_reasoning(client: Client) -> None:
    """Which the prompt has begun, or which the answer begins."""
    yes = v1.ResponseFormat(choices=v1.Choices(texts=["yes", "no"]))
    begun = asked(user("Does it rain?"))
    begun.chat.template_variables["thinks"] = True
    close = drawing(4, end_of_thought(client))
    thought = ask(client, content=begun, response_format=yes, sampling=close)
    assert thought.text in ("yes", "no")
    assert 0 < thought.finished.usage.reasoning_tokens < len(thought.tokens)
    assert thought.finished.finish_reason == STOP
    chosen = asked(user("Does it rain?"), opened("<think>"), continue_last=True)
    assert ask(client, content=chosen, response_format=yes, parse_mode=v1.PARSE_MODE_TEXT).text in ("yes", "no")
    called_behind = asked(user("Does it rain?"), tools=TOOLS)
    called_behind.chat.template_variables["thinks"] = True
    answer = ask(client, content=called_behind, tool_choice=choose(REQUIRED, "clock", most=1), sampling=close)
    assert called(answer) == ["clock"]
    assert reasoning(answer).strip() or answer.finished.usage.reasoning_tokens


@pytest.mark.parametrize("retention", [v1.REASONING_RETENTION_KEEP, v1.REASONING_RETENTION_DROP])
def test_reasoning_before_a_format_is_kept_or_dropped(
    client: Client, agent: str, retention: v1.ReasoningRetention.ValueType
) -> None:
    begun = asked(user("Does it rain?"))
    begun.chat.template_variables["thinks"] = True
    close = drawing(4, end_of_thought(client))
    wanted = v1.ResponseFormat(choices=v1.Choices(texts=["yes", "no"]))
    first = ask(client, agent, begun, response_format=wanted, sampling=close, reasoning_retention=retention)
    held = first.finished.agent.token_count
    second = ask(client, agent, asked(user("And?")), max_tokens=2)
    if retention == v1.REASONING_RETENTION_KEEP:
        assert second.cache.cached_tokens == held
    else:
        assert second.cache.cached_tokens < first.cache.prompt_tokens  # from before the mark that begins it


def end_of_thought(client: Client) -> int:
    return list(client.count(v1.Content(text="</think>")).token_ids)[-1]


def test_a_format_or_calls_where_the_context_has_tools(client: Client) -> None:
    wanted = v1.ResponseFormat(json_schema='{"enum": ["dry", "wet"]}')
    found = set()
    for seed in range(6):
        answer = ask(client, response_format=wanted, sampling=drawing(seed, temperature=3.0))
        calls = called(answer)
        found.add(bool(calls))
        assert calls or answer.finished.finish_reason == LENGTH or answer.text in ('"dry"', '"wet"')
        alone = ask(client, response_format=wanted, tool_choice=choose(NONE), seed=seed)
        assert alone.text.strip() in ('"dry"', '"wet"')
    assert True in found


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tool_choice": choose(REQUIRED, "thermometer")}, "tool_choice.allowed_names[0]"),
        ({"tool_choice": choose(REQUIRED), "content": asked(user("Hi"))}, "tool_choice"),
        ({"tool_choice": choose(REQUIRED, "clock", "clock")}, "tool_choice.allowed_names"),
        ({"tool_choice": choose(NONE, "clock")}, "tool_choice.allowed_names"),
        ({"tool_choice": choose(NONE, most=1)}, "tool_choice.max_calls"),
        ({"tool_choice": choose(REQUIRED, most=257)}, "tool_choice.max_calls"),
        ({"tool_choice": choose(REQUIRED), "ignore_eos": True}, "ignore_eos"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"tool_choice": choose(), "parse_mode": v1.PARSE_MODE_TEXT}, "tool_choice"),
        ({"tool_choice": choose(), "content": v1.Content(text="Hi")}, "tool_choice"),
        (
            {"tool_choice": choose(REQUIRED), "response_format": v1.ResponseFormat(regex="a")},
            "response_format",
        ),
        ({"tool_choice": v1.ToolChoice(mode=9)}, "tool_choice.mode"),  # type: ignore[arg-type]
    ],
    ids=range(12),
)
def test_what_makes_no_sense_is_named(client: Client, fields: dict[str, Any], field: str) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        ask(client, **fields)
    assert found[0].fields == [field]


def test_a_schema_that_can_not_be_enforced_is_refused_when_it_comes(client: Client, agent: str) -> None:
    parameters = '{"properties": {"a": {"not": {}}}}'
    content = asked(user("Hi"), tools=[CLOCK, v1.Tool(name="a", parameters_json=parameters, strict=True)])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
        client.prime(agent, content)
    assert "keyword not" in found[0].message
    assert "tools[1].parameters_json" in found[0].message
    text = asked(user("Hi"), tools=[v1.Tool(name="a", parameters_json='{"type": "string"}', strict=True)])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        client.prime(agent, text)
    client.prime(agent, asked(user("Hi"), tools=[v1.Tool(name="a", parameters_json=parameters)]))


def test_formats_that_can_not_be_forced_say_so(tmp_path: Path) -> None:
    """Calls that are bare objects, and such whose arguments are no JSON."""
    lark = v1.ResponseFormat(lark='start: "a"')
    with serving(tmp_path / "bare", "--model", folder_of(tmp_path / "bare-model", BARE)) as (_, bare):
        assert bare.info().features.tool_format == "llama3_json"
        answer = ask(bare, tool_choice=choose(REQUIRED, "weather"))
        assert called(answer) == ["weather"]
        assert not ask(bare, tool_choice=choose(NONE), max_tokens=9).text.lstrip().startswith("{")
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
            ask(bare, response_format=v1.ResponseFormat(json_schema="{}"))
        assert "llama3_json" in found[0].message
        assert ask(bare, response_format=lark, tool_choice=choose(NONE)).text == "a"
    with serving(tmp_path / "coder", "--model", folder_of(tmp_path / "coder-model", CODER)) as (_, coder):
        assert coder.info().features.tool_format == "qwen3_coder"
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
            ask(coder)
        assert "tools[0].strict" in found[0].message
        assert "qwen3_coder" in found[0].message
        unbound = asked(user("Hi"), tools=[v1.Tool(name="weather"), v1.Tool(name="clock")])
        end = list(coder.count(v1.Content(text="</tool_call>")).token_ids)[-1]
        close = drawing(4, end)
        answer = ask(coder, content=unbound, tool_choice=choose(REQUIRED, "clock", most=1), sampling=close)
        (call,) = answer.finished.tool_calls
        assert call.call.name == "clock" or call.raw.startswith("<tool_call>\n<function=clock>")
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
            ask(coder, content=unbound, response_format=lark)
        assert "response_format.lark" in found[0].message
