"""The command: who is talked to, and where questions come from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from warmkv_server.cli import reports
from warmkv_server.cli.chat.own_server import OwnServer
from warmkv_server.cli.chat.screen import Screen
from warmkv_server.cli.chat.session import PATIENCE, ChatSession, Lost
from warmkv_server.cli.chat.slash import COMMANDS, Leave, obey
from warmkv_server.cli.chat.tools import NO_TOOLS, Toolbox, ask
from warmkv_server.cli.connection import on_server
from warmkv_server.errors import OperatorError
from warmkv_server.platform import places

if TYPE_CHECKING:
    from warmkv.client import Client

_HISTORY = "chat-history"


@on_server
def chat(
    client: Client,
    agent: Annotated[str, typer.Option(help="Whose conversation; it goes on where it was.", metavar="ID")] = "chat",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer; 0 for the server's default.")] = 0,
    spawn: Annotated[bool, typer.Option("--spawn", help="Start a server for the chat where none listens.")] = False,
    model: Annotated[
        str | None, typer.Option(help="With --spawn, as for `warmkv serve`; its other options by environment.")
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            help="Python file whose functions the agent may call, each after a yes; it is told their docstrings and "
            "type hints.",
            metavar="FILE",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --tools: do every call without asking.")] = False,
) -> None:
    """Talk to an agent, and see where its context came from and how long it took.

    On a pipe, each line is a question or a command; answers are on stdout, all else on stderr, and the exit status is 1
    after the first question that failed.
    """
    if model is not None and not spawn:
        raise OperatorError("--model goes with --spawn; a server that runs has its model already")
    screen = Screen()
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    callable_ = _tools(tools, yes, interactive)
    with _server(client, spawn, model, screen) as own:
        if tools is not None:
            _require_tools(client, tools)
        session = ChatSession(
            client, agent, screen, own, max_tokens=max_tokens, interactive=interactive, tools=callable_
        )
        if interactive:
            _greet(session)
        for line in _prompts() if interactive else _lines():
            try:
                done = obey(line, session, interactive) if line.startswith("/") else session.ask(line)
            except Leave:
                break
            except Lost as lost:
                screen.problem(str(lost))
                done = False
            if not done and not interactive:
                raise typer.Exit(1)


def _tools(file: Path | None, yes: bool, interactive: bool) -> Toolbox:
    """
    Raises:
        OperatorError: the file can't be used, or nobody can be asked.
    """
    if file is None:
        if yes:
            raise OperatorError("--yes goes with --tools; without them there is nothing to allow")
        return NO_TOOLS
    if not (yes or interactive):
        raise OperatorError(
            "--tools asks before each call, and on a pipe there is nobody to ask; say --yes to allow all"
        )
    from warmkv_server.cli.chat import functions

    return Toolbox(functions.read(file), (lambda _: True) if yes else ask)


def _require_tools(client: Client, file: Path) -> None:
    info = client.info()
    if not info.features.tool_format:
        raise OperatorError(
            f"--tools {file}: {info.model_id} at {client.target} has no tools, or none whose calls can be read; serve "
            "another model, or give it a chat template with tools (`warmkv serve --chat-template`)"
        )


@contextlib.contextmanager
def _server(client: Client, spawn: bool, model: str | None, screen: Screen) -> Iterator[OwnServer | None]:
    """A server that is ready: the one that is there, or else one of the chat's own if that is wanted."""
    from warmkv.client import WarmKVError

    try:
        client.info()
    except WarmKVError as error:
        if not error.is_unavailable or not (error.reason or spawn):
            raise
        there = bool(error.reason)
    else:
        there = True
    if there:
        if spawn:
            screen.note(f"a server listens at {client.target} already")
        client.wait_until_ready(PATIENCE)  # which it may not be yet
        yield None
        return
    own = OwnServer(client.target, model)
    screen.note(f"starting a server; its log is {own.log}")
    try:
        own.ensure()
        yield own
    finally:
        own.stop()


def _greet(session: ChatSession) -> None:
    info = session.client.info()
    screen = session.screen
    screen.note(f"{info.model_id} at {session.client.target}; /help lists commands, Ctrl-D leaves")
    known = session.known()
    if known is None:
        screen.note(f"agent {session.agent} is new")
    else:
        tokens = f"{known.token_count:,} tokens, {reports.tier(known.tier)}"
        screen.note(f"agent {session.agent} goes on: {tokens}; /delete begins anew")


def _prompts() -> Iterator[str]:
    """What is typed, with history and completion. Ctrl-C empties the line, Ctrl-D ends."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    history: History = InMemoryHistory()
    with contextlib.suppress(OSError):
        folder = places.state_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / _HISTORY).touch(mode=0o600)
        history = FileHistory(str(folder / _HISTORY))
    completer: Completer = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    session: PromptSession[str] = PromptSession(history=history, completer=completer)
    while True:
        try:
            line = session.prompt("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line:
            yield line


def _lines() -> Iterator[str]:
    """What comes through a pipe."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    for line in sys.stdin:
        if stripped := line.strip():
            yield stripped
