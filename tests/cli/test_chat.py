"""`warmkv chat` as people and programs use it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.terminal import Terminal, terminal
from tests.e2e.harness import WARMKV, Client, Server, clean_environment, free_port, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that, read_deltas
from warmkv_server.cli.main import app

PROMPT = r"\n>"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    """A server that computes one request at a time."""
    with serving(tmp_path_factory.mktemp("chat") / "data", "--max-batch", "1") as pair:
        yield pair


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Nothing of the user's who runs the tests."""
    return {"XDG_STATE_HOME": str(folder / "state"), "XDG_DATA_HOME": str(folder / "share"), **more}


def piped(folder: Path, said: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [WARMKV, "chat", *arguments],
        input=said,
        env=clean_environment() | environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ask(chat: Terminal, line: str) -> None:
    chat.expect(PROMPT)
    chat.type(line)


def test_on_a_pipe(pair: tuple[Server, Client], tmp_path: Path) -> None:
    server, client = pair
    said = "/system You are a helpful assistant.\nHello! My name is Grace.\n\n/evict\nWhat is my name?\n/save FILE\n"
    talk = tmp_path / "talk.json"
    done = piped(tmp_path, said.replace("FILE", str(talk)), "--agent", "ada", "--target", server.address)
    assert done.returncode == 0, done.stderr
    _, second = done.stdout.splitlines()
    assert second == "Your name is Grace."
    reports = [line for line in done.stderr.splitlines() if " · first token " in line]
    assert [line.partition(" · ")[0] for line in reports] == ["hot", "warm"]
    assert re.search(r"\d+ reused, 8 computed · [\d.]+ KiB read · .*tokens/s · persisted", reports[1])
    assert [(m["role"], m["content"]) for m in json.loads(talk.read_text())][2:] == [
        ("user", "What is my name?"),
        ("assistant", second),
    ]
    assert client.get("ada").revision == 3


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ("/nope", "there is no /nope"),
        ("/system Too late.", "/delete it first"),
        ("/save .", "can't be written"),
        ("/fork a b", "/fork NEW"),
        ("/fork other\n/fork other", "there is an agent 'other' already"),
        ("/agent no_such_id!\nHello!", "agent_id"),
    ],
)
def test_a_pipe_ends_at_what_fails(pair: tuple[Server, Client], wrong: str, word: str) -> None:
    server, client = pair
    client.prime("failing", token_ids(some_tokens(9)))
    client.delete("other", allow_missing=True)
    arguments = ["chat", "--agent", "failing", "--target", server.address]
    done = CliRunner().invoke(app, arguments, input=f"{wrong}\nHello!\n", catch_exceptions=False)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert word in done.stderr.splitlines()[-1]


def test_where_no_server_is() -> None:
    done = CliRunner().invoke(app, ["chat", "--target", f"127.0.0.1:{free_port()}"], input="Hello!\n")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no server answers" in done.stderr


def test_in_a_terminal(pair: tuple[Server, Client], tmp_path: Path) -> None:
    server, client = pair
    client.delete("chat", allow_missing=True)
    with terminal("chat", "--target", server.address, environment=environment(tmp_path)) as chat:
        chat.expect("agent chat is new")
        ask(chat, "Hello! My name is Grace.")
        chat.expect("(cold|shared) .* persisted")
        chat.expect(PROMPT)
        chat.send("/he")
        chat.expect("/help")  # in the menu
        chat.send("\t")
        chat.expect("lp")  # what of it is taken over
        chat.type("")
        chat.expect("/agents .*list the server's agents")
        ask(chat, "Some words. " * 900)
        chat.expect("computing the context")
        chat.expect("hot .* computed .* persisted")
        ask(chat, "/stats")
        chat.expect("prompt tokens computed")
        # Ctrl-C ends an answer, here one that waits for another agent's, and not the chat.
        long = client.stream("long", token_ids(some_tokens(50)), max_tokens=20_000, ignore_eos=True)
        read_deltas(long, 1)
        ask(chat, "And now?")
        await_that(lambda: client.stats().gauges.queue_depth == 1)
        chat.send("\x03")
        chat.expect("stopped before the answer began")
        long.cancel()
        ask(chat, "/delete")
        chat.expect(r"for good\? \[y/N\]")
        chat.type("y")
        chat.expect("is deleted")
        chat.expect(PROMPT)
        chat.send("\x04")
        assert chat.wait() == 0
    (history,) = (tmp_path / "state" / "warmkv").iterdir()
    assert "My name is Grace" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_a_chat_goes_on_when_its_server_was_killed(tmp_path: Path) -> None:
    port = str(free_port())
    target = f"127.0.0.1:{port}"
    first = Server(tmp_path / "data", "--port", port)
    again: list[Server] = []
    try:
        with terminal("chat", "--target", target, environment=environment(tmp_path)) as chat:
            ask(chat, "/system You are a helpful assistant.")
            chat.expect("persisted")
            ask(chat, "Hello! My name is Grace.")
            chat.expect("hot .* persisted")
            first.kill()
            ask(chat, "What is my name?")
            chat.expect("went away; waiting for it")
            again.append(Server(tmp_path / "data", "--port", port))
            chat.expect(r"Your name is Grace\.\s+warm · 33 reused, 8 computed .* persisted")
            chat.expect(PROMPT)
            chat.send("\x04")
            assert chat.wait() == 0
    finally:
        for server in (first, *again):
            server.kill()


def test_a_server_of_the_chats_own(tmp_path: Path) -> None:
    port = free_port()
    target = ("--target", f"127.0.0.1:{port}")
    done = piped(tmp_path, "Hello!\n", "--spawn", *target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "persisted" in done.stderr
    with socket.socket() as free, pytest.raises(ConnectionRefusedError):
        free.connect(("127.0.0.1", port))
    assert (tmp_path / "share" / "warmkv" / "index.sqlite").exists()
    refused = piped(tmp_path, "Hello!\n", "--spawn", "--model", "builtin:huge", *target)
    assert refused.returncode == 2
    assert "builtin:huge" not in refused.stdout
    assert "there is no built-in model 'huge'" in refused.stderr.splitlines()[-1]
    assert piped(tmp_path, "", "--spawn", "--target", "example.org:1").returncode == 2
