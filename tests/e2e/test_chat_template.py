"""`--chat-template`: another template on the same model, and what agents hold goes on under it."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from tests.e2e.commands import run_warmkv
from tests.e2e.harness import Client, refused, serving
from tests.e2e.test_tools import CALL, TEMPLATE, VALID, WEATHER, ask, asked, result, user
from tests.engine.parrot import write_speaker
from warmkv import v1
from warmkv_server.text.loading import load

OTHER = (
    TEMPLATE.replace("tool_response>", "tool_result>")
    .replace("You may call:", "Tools:")
    .replace("thinks", "ponders")
    .replace("<|end|>", "\n<|end|>")
)
WITHOUT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "speaker"
    write_speaker(path, TEMPLATE, [("<|assistant|>", *CALL)])
    return path


def spelt(client: Client, folder: Path, content: v1.Content, agent: str) -> str:
    return str(load(folder).decode(list(client.count(content, agent_id=agent).token_ids)))


def test_contexts_stay_and_go_on_under_another_template(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text(OTHER)
    data, question = tmp_path / "data", asked(user("Weather?"), tools=[WEATHER])
    question.chat.template_variables["thinks"] = False
    with serving(data, "--model", str(folder)) as (_, client):
        own = client.info()
        (call,) = ask(client, "a", question).finished.tool_calls
        ask(client, "b", asked(user("Weather?"), tools=[WEATHER]))
        told = asked(result(call.call.id, "Rain."))
        assert "<tool_response>" in spelt(client, folder, told, "a")
    with serving(data, "--model", str(folder), "--chat-template", str(other)) as (_, client):
        info = client.info()
        assert info.fingerprint == own.fingerprint
        assert info.chat_template_digest not in ("", own.chat_template_digest)
        assert list(info.features.template_variables) == ["ponders"]
        held = client.get("a").token_count
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
            ask(client, "a", told)  # with the variable that it was begun with
        assert "thinks" in found[0].message
        assert "they are the context's; send others, or {}" in found[0].message
        told.chat.template_variables.SetInParent()
        assert "<tool_result>" in spelt(client, folder, told, "a")
        answer = ask(client, "a", told)  # of a call that was made under the other one
        assert (answer.cache.cached_tokens, answer.cache.held_tokens) == (held, held)
        assert answer.cache.warm_tokens == held
        assert answer.finished.tool_calls[0].status == VALID
        held = client.get("a").token_count
    without = tmp_path / "without.jinja"
    without.write_text(WITHOUT)
    with serving(data, "--model", str(folder), "--chat-template", str(without)) as (_, client):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED") as found:
            ask(client, "b", asked(user("And now?")))
        assert "they are the context's; replace it without them" in found[0].message
        client.prime("b", asked(user("And now?")))
    with serving(data, "--model", str(folder)) as (_, client):
        assert client.info().chat_template_digest == own.chat_template_digest
        assert ask(client, "a", asked(user("And now?"))).cache.cached_tokens == held


def test_a_check_says_what_the_other_template_can_or_why_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    given = run_warmkv("models", "check", "builtin:tiny", "--chat-template", path).stdout
    assert f"{path}, in place of the model's own" in given
    assert "calls as json_tools" in given
    path.write_text("{{ raise_exception('Never.') }}")
    refusal = run_warmkv("models", "check", "builtin:tiny", "--chat-template", path)
    assert refusal.returncode == 2
    assert f"warmkv: --chat-template {path}: a user's message is refused: Never." in refusal.stderr.splitlines()[-1]
