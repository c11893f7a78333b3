"""Rounds of tools with real models and templates: what is sent is computed, and nothing twice."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.clock import Shift
from tests.e2e.harness import Client, Server, serving, text
from tests.e2e.test_tools import WEATHER, ask, asked, result, user
from tests.reference import sources
from tests.reference.conftest import fetched
from warmkv import v1

ROUNDS = 10
CHATML = """\
{%- if tools -%}<|im_start|>system
You may call these functions:
{% for tool in tools -%}{{ tool.function | tojson }}
{% endfor -%}<|im_end|>
{% endif -%}
{%- for m in messages -%}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] -%}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
"""As SmolLM2 knows it, with tools."""
CITIES = ("Paris", "Rome", "Oslo", "Bern", "Madrid", "London", "Berlin", "Athens", "Vienna", "Lisbon")
SHOWN = 3
"""Calls that it is shown, so that it goes on with them by itself."""
MARKS = 12
"""Tokens around a result, at most."""


def shown() -> list[v1.ChatMessage]:
    """A question, and how it is gone about."""
    messages = [user(f"What is the weather in {', '.join(CITIES)}? Call weather for each city, one after the other.")]
    for number, city in enumerate(CITIES[:SHOWN]):
        call = v1.ToolCall(id=f"call{number}", name="weather", arguments_json=f'{{"place": "{city}"}}')
        messages += [
            v1.ChatMessage(role="assistant", tool_calls=[call]),
            result(call.id, f"{number} degrees in {city}"),
        ]
    return messages


def test_ten_rounds_on_smollm2_compute_ten_results_also_after_kill_9(smollm2: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    flags = ("--model", str(smollm2), "--chat-template", str(template))
    server = Server(tmp_path / "data", *flags)
    client = Client(server.address)
    try:
        answer = ask(client, "a", asked(*shown(), tools=[WEATHER]), max_tokens=64)
        for number in range(ROUNDS):
            if number == ROUNDS // 2:
                server.kill()
                client.channel.close()
                server = Server(tmp_path / "data", *flags)
                client = Client(server.address)
            assert answer.finished.finish_reason == v1.FINISH_REASON_TOOL_CALLS, answer.text
            held = client.get("a").token_count
            said = f"{number + 10} degrees and clear"
            told = asked(*(result(each.call.id, said) for each in answer.finished.tool_calls))
            counted = client.count(told, agent_id="a")
            answer = ask(client, "a", told, max_tokens=64)
            assert not counted.replaced_tokens
            assert answer.cache.prefilled_tokens == counted.token_count
            assert answer.cache.prefilled_tokens <= len(client.count(text(said)).token_ids) + MARKS
            assert answer.cache.cached_tokens == answer.cache.held_tokens == held
            source = v1.CACHE_SOURCE_WARM if number == ROUNDS // 2 else v1.CACHE_SOURCE_HOT
            assert answer.cache.source == source
    finally:
        server.kill()
        client.channel.close()


def test_a_day_that_passes_changes_no_token_of_llama_3_2(tmp_path: Path) -> None:
    """Its template writes today's date where the request doesn't say another one."""
    (template,) = (each for each in fetched(sources.templates) if "Llama-3.2-3B" in each.name)
    shift = Shift(tmp_path)
    question = asked(user("Which day is it?"))
    flags = ("--chat-template", str(template))
    with serving(tmp_path / "data", *flags, environment=shift.environment) as (_, client):
        assert "date_string" in client.info().features.template_variables
        held = client.prime("a", question).agent
        today = list(client.count(question).token_ids)
        shift.days(1)
        assert list(client.count(question).token_ids) != today  # for a new agent it is tomorrow
        again = client.prime("a", question)
        assert again.cache.prefilled_tokens == 0
        assert (again.agent.revision, again.agent.token_count) == (held.revision, held.token_count)
        assert client.prime("b", question).cache.prefilled_tokens > 0
