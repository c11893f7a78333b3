"""Agents that call tools, over a real socket: calls are read as they come, and results cost what they are long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.e2e.clock import Shift
from tests.e2e.commands import run_warmkv
from tests.e2e.harness import Answer, Client, Server, chat, refused, serving
from tests.engine.parrot import write_speaker
from tests.engine.tokenizers import variant
from warmkv import v1
from warmkv_server.engine.model.load import BUILT_IN

TEMPLATE = """\
{%- if tools -%}<|system|>You may call:
{% for tool in tools -%}{{ tool | tojson }}
{% endfor -%}<|end|>{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}<|user|><tool_response>
{{ m.content }}
</tool_response><|end|>
{%- else -%}<|{{ m.role }}|>
{%- if m.reasoning_content and loop.last -%}<think>
{{ m.reasoning_content }}
</think>

{% endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] -%}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{%- endfor -%}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- if thinks is defined and thinks -%}<think>
{% endif -%}{%- endif -%}
"""
CALL = (
    "<tool_call>",
    '\n{"name": "weather", "argu',
    'ments": {"place": ',
    '"Zürich </tool_call>"',
    "}}\n",
    "</tool_call>",
)
SAYINGS = [
    ("<|assistant|>", *CALL),
    ("!1", '<tool_call>{"name": "wether", "arguments": {}}</tool_call>'),
    ("!2", '<tool_call>{"name": "weather", "arguments": {"place": 7}}</tool_call>'),
    ("!3", "<tool_call>wea", "ther(Zurich)</tool", "_call>", " Sorry."),
    (
        "!4",
        '<tool_call>{"name": "weather", "arguments": {"place": "Uri"}}</tool_call>\n',
        "<tool_call>{",
        '"name": "clock"}</tool_call>',
    ),
    ("!5", "<think>", "\nHm, ", "well.\n", "</think>", "\n\n", "It is ", "fine."),
]
WEATHER = v1.Tool(
    name="weather",
    description="The weather at a place.",
    parameters_json='{"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}',
)
CLOCK = v1.Tool(name="clock", description="The time.")
TOOLS_TEMPLATE = Path(__file__).parents[2] / "examples" / "agent_loop" / "tools.jinja"
"""For the built-in model."""
VALID, MALFORMED = v1.TOOL_CALL_STATUS_VALID, v1.TOOL_CALL_STATUS_MALFORMED
ARGUMENTS = '{"place": "Zürich </tool_call>"}'


def asked(*messages: v1.ChatMessage, tools: list[v1.Tool] | None = None, **fields: object) -> v1.Content:
    content = v1.ChatMessages(messages=messages, **fields)  # type: ignore[arg-type]
    if tools is not None:
        content.tools.CopyFrom(v1.ToolList(tools=tools))
    return v1.Content(chat=content)


def user(text: str) -> v1.ChatMessage:
    return v1.ChatMessage(role="user", content=text)


def result(call: str, text: str) -> v1.ChatMessage:
    return v1.ChatMessage(role="tool", content=text, tool_call_id=call)


def opened(cue: str) -> v1.ChatMessage:
    """An answer that goes on behind a cue."""
    return v1.ChatMessage(role="assistant", content=cue)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "speaker"
    write_speaker(path, TEMPLATE, SAYINGS)
    return str(path)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, folder: str) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("server") / "data", "--model", folder) as (_, client):
        yield client


def ask(client: Client, agent: str, content: v1.Content | None, **fields: object) -> Answer:
    return client.generate(agent, content, **{"max_tokens": 32, "ignore_eos": False, **fields})


def say(client: Client, cue: str, **fields: object) -> Answer:
    """What the model says behind a cue, to somebody who has tools."""
    agent = fields.pop("agent", "")
    messages = [user("Go on."), opened(cue)]
    return ask(client, str(agent), asked(*messages, tools=[WEATHER, CLOCK], continue_last=True), **fields)


def pieces(answer: Answer, index: int = 0) -> str:
    news = [news for delta in answer.deltas for news in delta.tool_calls if news.index == index]
    kinds = [each.WhichOneof("event") for each in news]
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    assert set(kinds[1:-1]) <= {"arguments"}
    return "".join(each.arguments for each in news[1:-1])


def test_what_the_model_can_is_told(client: Client) -> None:
    features = client.info().features
    assert (features.tool_format, list(features.reasoning_marks)) == ("json_tools", ["<think>", "</think>"])
    assert list(features.template_variables) == ["thinks"]
    assert not features.template_keeps_reasoning


def test_a_call_streams_piece_by_piece(client: Client) -> None:
    answer = ask(client, "", asked(user("Weather?"), tools=[WEATHER]))
    (call,) = answer.finished.tool_calls
    assert answer.finished.finish_reason == v1.FINISH_REASON_TOOL_CALLS
    assert (call.call.name, call.call.arguments_json, call.status) == ("weather", ARGUMENTS, VALID)
    assert (answer.text, pieces(answer)) == ("", ARGUMENTS)
    assert sum(1 for delta in answer.deltas for news in delta.tool_calls if news.HasField("arguments")) > 1
    whole = ask(client, "", asked(user("Weather?"), tools=[WEATHER]), stream_mode=v1.STREAM_MODE_FINAL)
    assert len(whole.deltas) == 1
    assert pieces(whole) == ARGUMENTS
    assert whole.finished.tool_calls[0] == call
    plain = ask(client, "", asked(user("Weather?"), tools=[WEATHER]), parse_mode=v1.PARSE_MODE_TEXT)
    assert plain.text == "".join(CALL)
    assert not plain.finished.tool_calls
    assert plain.finished.finish_reason == v1.FINISH_REASON_STOP


def test_what_can_be_wrong_with_a_call(client: Client) -> None:
    (unknown,) = say(client, "!1").finished.tool_calls
    assert (unknown.call.name, unknown.status) == ("wether", v1.TOOL_CALL_STATUS_UNKNOWN_TOOL)
    (mismatch,) = say(client, "!2").finished.tool_calls
    assert (mismatch.call.arguments_json, mismatch.status) == ('{"place": 7}', v1.TOOL_CALL_STATUS_SCHEMA_MISMATCH)
    answer = say(client, "!3")
    (malformed,) = answer.finished.tool_calls
    assert (malformed.status, malformed.raw) == (MALFORMED, "<tool_call>weather(Zurich)</tool_call>")
    assert answer.text == "Sorry."
    two = say(client, "!4")
    assert [(c.call.name, c.call.arguments_json, c.status) for c in two.finished.tool_calls] == [
        ("weather", '{"place": "Uri"}', VALID),
        ("clock", "{}", VALID),
    ]
    assert pieces(two, 1) == "{}"


def test_an_answer_that_ends_inside_a_call(client: Client) -> None:
    answer = ask(client, "", asked(user("Weather?"), tools=[WEATHER]), max_tokens=4)
    assert answer.finished.finish_reason == v1.FINISH_REASON_LENGTH
    (call,) = answer.finished.tool_calls
    assert call.status == v1.TOOL_CALL_STATUS_INCOMPLETE
    assert call.call.arguments_json == pieces(answer) == '{"place": "Zürich </tool_call>"'


FORCED = v1.ToolChoice(mode=v1.TOOL_CHOICE_MODE_REQUIRED, max_calls=1)


@pytest.mark.parametrize("built_in", [False, True], ids=["says calls", "is held to calls"])
def test_ten_rounds_compute_ten_results_also_after_kill_9(tmp_path: Path, folder: str, built_in: bool) -> None:
    tools = [WEATHER, CLOCK]
    flags, fields = ("--model", folder), {}
    if built_in:
        flags, fields = ("--chat-template", str(TOOLS_TEMPLATE)), {"tool_choice": FORCED, "max_tokens": 64}
        place = '{"type": "object", "properties": {"place": {"type": "string", "maxLength": 9}}'
        tools = [v1.Tool(name="weather", parameters_json=f'{place}, "additionalProperties": false}}', strict=True)]
    server = Server(tmp_path / "data", *flags)
    client = Client(server.address)
    answer = ask(client, "a", asked(user("Weather?"), tools=tools), **fields)
    words = 0
    for number in range(10):
        if number == 5:
            server.kill()
            client.channel.close()
            server = Server(tmp_path / "data", *flags)
            client = Client(server.address)
        held = client.get("a").token_count
        (call,) = answer.finished.tool_calls
        assert call.status == VALID
        told = asked(result(call.call.id, f"It is {number} degrees, and it rains."))
        counted = client.count(told, agent_id="a")
        answer = ask(client, "a", told, **fields)
        assert not counted.replaced_tokens
        assert answer.cache.prefilled_tokens == counted.token_count
        assert answer.cache.cached_tokens == answer.cache.held_tokens == held
        words = counted.token_count
        assert answer.finished.finish_reason == v1.FINISH_REASON_TOOL_CALLS
    # The result and the marks around it, and nothing of the tools or of the call.
    assert words < 48
    server.kill()
    client.channel.close()


def test_what_is_appended_is_what_the_template_writes(client: Client) -> None:
    ask(client, "same", asked(user("Weather?"), tools=[WEATHER]))
    (call,) = ask(client, "same", asked(user("Really?"))).finished.tool_calls
    new = list(client.count(asked(result(call.call.id, "Sun.")), agent_id="same").token_ids)
    made = v1.ToolCall(id="c1", name="weather", arguments_json=ARGUMENTS)
    messages = [user("Weather?"), v1.ChatMessage(role="assistant", tool_calls=[made]), result("c1", "Sun.")]
    whole = list(client.count(asked(*messages, tools=[WEATHER])).token_ids)
    assert whole[-len(new) :] == new
    until = list(client.count(asked(*messages[:2], tools=[WEATHER]), context_mode=v1.CONTEXT_MODE_REPLACE).token_ids)
    assert len(until) - 1 == len(whole) - len(new)  # but for the generation prompt


def test_calls_wait_in_forks_and_archives_too(tmp_path: Path, folder: str) -> None:
    with serving(tmp_path / "data", "--model", folder) as (server, client):
        (call,) = ask(client, "a", asked(user("Weather?"), tools=[WEATHER])).finished.tool_calls
        client.fork("a", "b")
        ask(client, "a", asked(result(call.call.id, "Sun.")))
        assert ask(client, "b", asked(result(call.call.id, "Rain."))).finished.tool_calls
        client.fork("b", "c")
        (waiting,) = ask(client, "c", asked(user("And now?"))).finished.tool_calls
        server.terminate()
    archive = tmp_path / "c.tar"
    run_warmkv("agents", "export", "c", "-o", archive, "--data-dir", tmp_path / "data").check_returncode()
    other = tmp_path / "other"
    run_warmkv("agents", "import", archive, "--data-dir", other, "--model", folder).check_returncode()
    with serving(other, "--model", folder) as (_, client):
        held = client.get("c").token_count
        answer = ask(client, "c", asked(result(waiting.call.id, "Snow.")))
        assert answer.cache.cached_tokens == held
        assert answer.finished.tool_calls[0].status == VALID  # its tools came along


def test_results_need_their_calls(client: Client) -> None:
    tools = [WEATHER, CLOCK]
    calls = say(client, "!4", agent="two").finished.tool_calls
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        ask(client, "two", asked(result("nobody", "?")))
    assert found[0].fields == ["content.chat.messages[0].tool_call_id"]
    assert calls[0].call.id in found[0].message
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        ask(client, "two", asked(result("", "?")))  # of which?
    both = [result(calls[1].call.id, "Noon."), result(calls[0].call.id, "Sun.")]
    client.extend("two", asked(both[0]))
    client.extend("two", asked(result("", "Sun.")))  # the only one that waits
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NO_PENDING_CALL"):
        client.extend("two", asked(both[1]))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NO_PENDING_CALL"):
        ask(client, "", asked(user("Hi"), result("x", "Sun."), tools=tools))


def test_tools_stay(client: Client) -> None:
    ask(client, "kept", asked(user("Weather?"), tools=[WEATHER]))
    assert ask(client, "kept", asked(user("Again?"), tools=[WEATHER])).finished.tool_calls[0].status == VALID
    for tools in ([CLOCK], [], [WEATHER, CLOCK]):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "TOOLS_CHANGED"):
            ask(client, "kept", asked(user("And?"), tools=tools))
    replaced = ask(client, "kept", asked(user("And?"), tools=[CLOCK]), context_mode=v1.CONTEXT_MODE_REPLACE)
    assert replaced.finished.tool_calls[0].status == v1.TOOL_CALL_STATUS_UNKNOWN_TOOL
    assert replaced.cache.held_tokens > replaced.cache.cached_tokens
    bare = ask(client, "kept", asked(user("And?")), context_mode=v1.CONTEXT_MODE_REPLACE)
    assert not bare.finished.tool_calls  # without tools nothing is a call
    assert bare.text == "".join(CALL)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (asked(user("?"), tools=[v1.Tool(name="a b")]), "tools.tools[0].name"),
        (asked(user("?"), tools=[v1.Tool(name="a"), v1.Tool(name="a")]), "tools.tools"),
        (asked(user("?"), tools=[v1.Tool(name="a", parameters_json="[]")]), "tools.tools[0].parameters_json"),
        (asked(user("?"), tools=[v1.Tool(name="a", parameters_json='{"type": 3}')]), "tools.tools[0].parameters_json"),
        (asked(v1.ChatMessage(role="user", content="?", reasoning="Hm.")), "messages[0].reasoning"),
        (asked(v1.ChatMessage(role="user", content="?", tool_call_id="x")), "messages[0].tool_call_id"),
        (asked(v1.ChatMessage(role="assistant", tool_calls=[v1.ToolCall(name="a")])), "messages[0].tool_calls[0].id"),
        (asked(user("?"), continue_last=True), "continue_last"),
    ],
    ids=range(8),
)
def test_what_makes_no_sense_is_named(client: Client, content: v1.Content, field: str) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        ask(client, "", content)
    assert found[0].fields == [f"content.chat.{field}"]


def test_what_the_model_cannot_is_refused_by_name(client: Client, tmp_path: Path) -> None:
    image = v1.ChatMessage(role="user", parts=[v1.ContentPart(text="See: "), v1.ContentPart(image=b"x" * 100_000)])
    unknown = asked(user("?"))
    unknown.chat.template_variables["enable_thinking"] = True
    for content, name in ((asked(image), "image"), (unknown, "enable_thinking")):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
            ask(client, "", content)
        assert name in found[0].message
    with serving(tmp_path / "data") as (_, other):  # whose template knows none
        assert not other.info().features.tool_format
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
            ask(other, "", asked(user("?"), tools=[WEATHER]))
        assert "content.chat.tools" in found[0].message
        parts = [v1.ContentPart(text="Who are "), v1.ContentPart(text="you?")]
        said = other.count(asked(v1.ChatMessage(role="user", parts=parts)))
        assert said.token_ids == other.count(chat(("user", "Who are you?"))).token_ids


def test_reasoning_is_told_apart(client: Client) -> None:
    answer = say(client, "!5")
    assert "".join(delta.reasoning for delta in answer.deltas) == "Hm, well."
    assert answer.text == "It is fine."
    assert answer.finished.usage.reasoning_tokens == 4
    assert answer.finished.usage.completion_tokens == 8
    begun = asked(user("Weather?"), tools=[WEATHER])
    begun.chat.template_variables["thinks"] = True
    thinks = ask(client, "", begun, max_tokens=3)
    assert not thinks.text
    assert any(delta.reasoning for delta in thinks.deltas)


def test_reasoning_is_dropped_at_the_next_question(client: Client) -> None:
    for agent, retention in (("keeps", v1.REASONING_RETENTION_KEEP), ("drops", v1.REASONING_RETENTION_DROP)):
        first = say(client, "!5", agent=agent, reasoning_retention=retention)
        held = first.finished.agent.token_count
        counted = client.count(asked(user("And?")), agent_id=agent)
        second = ask(client, agent, asked(user("And?")))
        assert second.cache.held_tokens == held
        assert second.cache.prompt_tokens == held - counted.replaced_tokens + counted.token_count
        if retention == v1.REASONING_RETENTION_KEEP:
            assert second.cache.prefilled_tokens == counted.token_count
        else:
            gone = held + len(client.count(asked(user("And?")), agent_id="keeps").token_ids)
            answer = len(first.tokens) - 5  # without "<think>", two words, "</think>" and white space
            assert counted.replaced_tokens == 5 + answer
            assert second.cache.prompt_tokens < gone
            assert second.cache.cached_tokens == held - len(first.tokens)


def test_a_retry_gets_the_calls_again(client: Client) -> None:
    content = asked(user("Weather?"), tools=[WEATHER])
    first = ask(client, "again", content, request_id="r1")
    second = ask(client, "again", content, request_id="r1")
    assert second.finished == first.finished
    assert pieces(second) == pieces(first)
    assert json.loads(pieces(second)) == {"place": "Zürich </tool_call>"}


def test_an_answer_goes_on_from_where_it_was_left_open(client: Client) -> None:
    begun = asked(user("Weather?"), opened("It is warm and"), continue_last=True)
    held = client.prime("open", begun).agent.token_count
    whole = list(client.count(asked(user("Weather?"), opened("It is warm and"))).token_ids)
    assert list(client.count(begun).token_ids) == whole[:held]
    answer = ask(client, "open", None, max_tokens=4, ignore_eos=True)
    assert answer.cache.prompt_tokens == held
    appended = asked(opened("So"), continue_last=True)
    ask(client, "other", asked(user("Weather?")), max_tokens=2)
    assert client.extend("other", appended).agent.token_count > client.get("open").token_count - held


def test_history_with_calls_costs_its_results_only_on_the_built_in_weights(tmp_path: Path) -> None:
    """Calls that a client has from elsewhere, and results behind them, ten times."""
    folder = tmp_path / "model"
    folder.mkdir()
    variant(folder, chat_template=TEMPLATE)
    (folder / "model.safetensors").symlink_to(BUILT_IN / "tiny" / "model.safetensors")
    with serving(tmp_path / "data", "--model", str(folder)) as (_, client):
        client.prime("a", asked(user("Weather?"), tools=[WEATHER]))
        for number in range(10):
            made = v1.ToolCall(id=f"call{number}", name="weather", arguments_json='{"place": "Uri"}')
            client.extend("a", asked(v1.ChatMessage(role="assistant", tool_calls=[made])))
            held = client.get("a").token_count
            told = asked(result(f"call{number}", f"{number} degrees"))
            counted = client.count(told, agent_id="a")
            answer = ask(client, "a", told, max_tokens=3, ignore_eos=True)
            assert answer.cache.prefilled_tokens == counted.token_count - counted.replaced_tokens
            assert answer.cache.prompt_tokens == held + counted.token_count - counted.replaced_tokens


DATED = """\
{%- if not today is defined -%}{%- set today = strftime_now('%d %b %Y') -%}{%- endif -%}
<|system|>Today is {{ today }}.<|end|>
{%- for m in messages -%}<|{{ m.role }}|>{{ m.content }}<|end|>{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def test_a_day_that_passes_changes_no_token(tmp_path: Path) -> None:
    folder, shift = tmp_path / "model", Shift(tmp_path)
    write_speaker(folder, DATED, [("<|assistant|>", "Fine.")])
    question = asked(user("Which day is it?"))
    with serving(tmp_path / "data", "--model", str(folder), environment=shift.environment) as (_, client):
        assert list(client.info().features.template_variables) == ["today"]
        held = client.prime("a", question).agent
        today = list(client.count(question).token_ids)
        shift.days(40)
        assert list(client.count(question).token_ids) != today
        again = client.prime("a", question)
        assert again.cache.prefilled_tokens == 0
        assert again.agent.revision == held.revision
        other = asked(user("Which day is it?"))
        other.chat.template_variables["today"] = "Sunday"
        assert client.prime("a", other).cache.prefilled_tokens > 0
        assert client.prime("a", question).cache.prefilled_tokens == 0  # it stays until another is given
