"""Conversations as the chat template means them, whatever happens to the server between the turns."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from tests.e2e.harness import chat, refused, serving, text, token_ids
from tests.engine.folders import END
from tests.engine.tokenizers import built_in, variant
from warmkv import v1
from warmkv_server.engine.model.load import BUILT_IN

FIRST_USER = """\
{%- set first = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{{- '<|' + m.role + '|>' + (first if loop.first else '') + m.content + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
"""The system text stands in the first user's turn, and nothing is written without one."""

NO_END = """\
{%- for m in messages -%}{{- m.role + ': ' + m.content + '\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}
"""
SYSTEM = ("system", "You are a careful assistant. " + "Be brief. " * 300)
"""More than what is kept of a short text."""
ENDS = v1.SamplingParams(temperature=0, logit_bias={END: 100.0})
QUESTION = ("user", "Who are you?")


def model(folder: Path, template: str) -> str:
    folder.mkdir()
    variant(folder, chat_template=template)
    (folder / "model.safetensors").symlink_to(BUILT_IN / "tiny" / "model.safetensors")
    return str(folder)


def test_a_system_message_alone_is_in_the_first_turn_also_after_kill_9_and_a_fork(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", FIRST_USER)
    with serving(tmp_path / "data", "--model", folder) as (server, client):
        held = client.prime("a", chat(SYSTEM)).agent.token_count
        whole = list(client.count(chat(SYSTEM, QUESTION)).token_ids)
        client.prime("other", chat(("system", "You are a pirate.")))
        client.prime("other", chat(SYSTEM))  # of the same tokens, and yet another context
        server.kill()
    (tmp_path / "data" / "index.sqlite").unlink(missing_ok=True)
    with serving(tmp_path / "data", "--model", folder) as (_, client):
        client.fork("a", "b")
        for agent in ("a", "b", "other"):
            new = client.count(chat(QUESTION), agent_id=agent)
            assert whole[held - new.replaced_tokens :] == list(new.token_ids)
            answer = client.generate(agent, chat(QUESTION))
            assert answer.cache.prompt_tokens == len(whole)
        more = client.count(chat(("user", "And now?")), agent_id="a")
        assert "careful" not in built_in().decode(list(more.token_ids))


@pytest.mark.parametrize("content", [text("Hi"), token_ids([7]), None], ids=["text", "ids", "none"])
def test_what_waits_is_not_lost_behind_something_else(tmp_path: Path, content: v1.Content | None) -> None:
    with serving(tmp_path / "data", "--model", model(tmp_path / "model", FIRST_USER)) as (_, client):
        client.prime("a", chat(SYSTEM))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
            client.generate("a", content)
        assert "user's message" in found[0].message
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
            client.generate("", chat(SYSTEM))
        assert found[0].fields == ["content.chat.messages[0]"]


def test_an_end_that_the_template_does_not_write_gives_way(tmp_path: Path) -> None:
    """The end of sequence of the answer is in the context until the next turn, whose template has none there."""
    with serving(tmp_path / "data", "--model", model(tmp_path / "model", NO_END), "--kv-bits", "0") as (_, client):
        answer = client.generate("a", chat(QUESTION), max_tokens=9, ignore_eos=False, sampling=ENDS)
        assert answer.finished.finish_reason == v1.FINISH_REASON_STOP
        prompt = list(client.count(chat(QUESTION)).token_ids)
        assert client.get("a").token_count == len(prompt) + len(answer.tokens)
        new = client.count(chat(("user", "So?")), agent_id="a")
        assert new.replaced_tokens == 1
        context = [*prompt, *answer.tokens[:-1], *new.token_ids]
        assert built_in().decode(context) == f"user: Who are you?\nassistant:{answer.text}\nuser: So?\nassistant:"
        second = client.generate("a", chat(("user", "So?")), max_tokens=8)
        assert second.cache.prompt_tokens == len(context)
        assert second.cache.cached_tokens >= len(context) - len(new.token_ids) - 1
        assert second.tokens == client.generate("", token_ids(context), max_tokens=8).tokens
