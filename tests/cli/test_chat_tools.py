"""`warmkv chat --tools`: functions that an agent calls, as people and programs have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.terminal import terminal
from tests.cli.test_chat import PROMPT, ask, environment, piped
from tests.e2e.harness import Client, Server, free_port, serving
from tests.e2e.test_tools import TEMPLATE
from tests.engine.parrot import write_speaker
from warmkv_server.cli.main import app

TEMPLATED = TEMPLATE.replace(
    "<|assistant|>{%- if thinks",
    "<|assistant|>{%- if messages[-1].role == 'tool' -%}<|told|>{%- endif -%}{%- if thinks",
)
CALLS = ('<tool_call>{"name": "weather", "arguments": {"place": "Uri"}}</tool_call>\n', '<tool_call>{"name": "wea')
SAYINGS = [
    ("<|assistant|>", "Wait. ", *CALLS, 'ther", "arguments": {"place": "Mars"}}</tool_call>'),
    ("<|told|>", "It rains.", " Take care."),
]
WEATHER = '''\
import sys

def weather(place: str) -> dict[str, object]:
    """The weather at a place."""
    print("asked")
    if place != "Uri":
        raise ValueError("there is none")
    return {"sky": "rain"}
'''


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    path = tmp_path_factory.mktemp("tools")
    write_speaker(path / "model", TEMPLATED, SAYINGS)
    with serving(path / "data", "--model", str(path / "model")) as pair:
        yield pair


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weather.py"
    path.write_text(WEATHER)
    return path


def test_on_a_pipe_all_is_allowed_or_nothing_is_begun(pair: tuple[Server, Client], tmp_path: Path, file: Path) -> None:
    server, client = pair
    target = ("--target", server.address)
    talk = tmp_path / "talk.json"
    options = ("--tools", str(file), "--yes", "--agent", "piped", *target)
    done = piped(tmp_path, f"/system Be brief.\nAnd the weather?\n/save {talk}\n", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Wait.", "It rains. Take care."]
    said = done.stderr.splitlines()
    assert [line for line in said if line.startswith(("weather(", "  ", "asked"))] == [
        'weather(place="Uri")',
        "asked",
        '  {"sky":"rain"}',
        'weather(place="Mars")',
        "asked",
        "  error: ValueError: there is none",
    ]
    messages = json.loads(talk.read_text())
    assert [each["role"] for each in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    calls = messages[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ['{"place": "Uri"}', '{"place": "Mars"}']
    assert [each["tool_call_id"] for each in messages[2:4]] == [call["id"] for call in calls]
    assert messages[2]["content"] == '{"sky":"rain"}'
    reports = [line for line in said if " · first token " in line]
    reused = [int(line.split(" · ")[1].split()[0]) for line in reports]
    assert reused[1] == client.get("piped").token_count - int(reports[1].split(" · ")[1].split()[2]) - 3
    file.write_text(WEATHER.replace("at a place", "anywhere"))
    changed = piped(tmp_path, "And now?\n", *options)
    assert changed.returncode == 1
    assert "agent piped has other tools than --tools gives now; /delete" in changed.stderr.splitlines()[-1]
    asked = piped(tmp_path, "And now?\n", "--tools", str(file), *target)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "on a pipe there is nobody to ask; say --yes" in asked.stderr


def test_in_a_terminal_each_call_is_asked_for(pair: tuple[Server, Client], tmp_path: Path, file: Path) -> None:
    server, _ = pair
    arguments = ("chat", "--target", server.address, "--tools", str(file))
    with terminal(*arguments, environment=environment(tmp_path)) as chat:
        ask(chat, "And the weather?")
        chat.expect(r'weather\(place="Uri"\)\s+do it\? \[y/N\]')
        chat.type("y")
        chat.expect(r'"sky":"rain"')
        chat.expect(r'weather\(place="Mars"\)\s+do it\? \[y/N\]')
        chat.type("")
        chat.expect("the user doesn't allow this call")
        chat.expect(r"It rains\. Take care\.\s+hot .* persisted")
        chat.expect(PROMPT)
        chat.send("\x04")
        assert chat.wait() == 0


def test_what_makes_no_sense_is_said_before_anything_is_asked(tmp_path: Path, file: Path) -> None:
    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["chat", *arguments], input="Hello!\n")
        assert (done.exit_code, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        return line

    nobody = ("--target", f"127.0.0.1:{free_port()}")
    assert "--yes goes with --tools" in refused("--yes", *nobody)
    assert "is not a file" in refused("--yes", "--tools", str(tmp_path), *nobody)
    with serving(tmp_path / "data") as (server, _):  # whose template knows no tools
        said = refused("--yes", "--tools", str(file), "--target", server.address)
        assert "builtin:tiny" in said
        assert "--chat-template" in said
