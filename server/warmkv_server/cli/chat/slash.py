"""What begins with a slash: commands to the chat instead of words to the agent."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from warmkv_server.cli import reports, running
from warmkv_server.cli.bar import Bar
from warmkv_server.cli.chat.session import ChatSession
from warmkv_server.offline import words


class Leave(Exception):
    """The chat is to end."""


class _Wrong(Exception):
    """A command was given in a wrong way: what is right."""


def obey(line: str, session: ChatSession, interactive: bool) -> bool:
    """Do what a line says. Returns whether it was done.

    Raises:
        Leave
        Lost: a call failed.
    """
    from warmkv.client import WarmKVError

    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        session.screen.problem(f"there is no /{name}; /help lists the commands")
        return False
    if name == "delete" and interactive and not _sure(session):
        return False
    try:
        COMMANDS[name](session, rest.strip())
    except _Wrong as wrong:
        session.screen.problem(str(wrong))
        return False
    except WarmKVError as error:
        raise session.lost(error) from None
    return True


def _agents(chat: ChatSession, _: str) -> None:
    """list the server's agents"""
    words.console().print(reports.agents(chat.client.agents()))


def _agent(chat: ChatSession, rest: str) -> None:
    """ID: talk to another agent, which is made if there is none"""
    chat.agent = _one(rest, "/agent ID")
    known = chat.known()
    chat.screen.note(f"agent {chat.agent}: " + (f"{known.token_count:,} tokens" if known is not None else "new"))


def _show(chat: ChatSession, rest: str) -> None:
    """[ID]: all that the server knows of this agent, or of another"""
    for topic, said in reports.agent(chat.client.get(rest or chat.agent)):
        chat.screen.show(f"{topic:<12} {said}")


def _fork(chat: ChatSession, rest: str) -> None:
    """NEW: make an agent with this context, and talk to that"""
    forked = chat.client.fork(chat.agent, _one(rest, "/fork NEW"))
    chat.screen.note(f"agent {forked.agent_id} has the context of {chat.agent}; this is {forked.agent_id} now")
    chat.agent = forked.agent_id


def _evict(chat: ChatSession, _: str) -> None:
    """drop the agent's copy in RAM: the next answer is warm"""
    done = chat.client.evict(chat.agent)
    chat.screen.note(f"{words.size(done.bytes_freed)} of RAM are free; {reports.tier(done.agent.tier)} now")


def _delete(chat: ChatSession, _: str) -> None:
    """delete the agent, and begin anew"""
    chat.client.delete(chat.agent)
    chat.screen.note(f"agent {chat.agent} is deleted; what you say next begins it anew")


def _stats(chat: ChatSession, _: str) -> None:
    """what the server has done, and does now"""
    words.console().print(running.screen(chat.client.info(), running.Seen.now(chat.client), None))


def _system(chat: ChatSession, rest: str) -> None:
    """TEXT: what the agent is to be; before anything is said"""
    if not rest:
        raise _Wrong("/system needs a text")
    if chat.known() is not None:
        raise _Wrong(
            f"agent {chat.agent} has a context already, and a system text stands at its beginning: /delete it first, "
            "or go to a new one with /agent ID"
        )
    with Bar() as bar:
        done = chat.client.prime(
            chat.agent, chat.content(("system", rest)), on_progress=bar.follow, expected_revision=0
        )
    chat.screen.note(reports.computed(done))


def _save(chat: ChatSession, rest: str) -> None:
    """FILE: write what was said here; as JSON messages if the name ends in .json"""
    file = Path(_one(rest, "/save FILE")).expanduser()
    if file.suffix == ".json":
        text = json.dumps(chat.said, ensure_ascii=False, indent=2)
    else:
        text = "\n\n".join(_as_text(message) for message in chat.said)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text + "\n")
    except OSError as error:
        raise _Wrong(f"{file} can't be written: {error.strerror or error}") from None
    chat.screen.note(f"{file}: {len(chat.said)} messages")


def _as_text(message: Mapping[str, Any]) -> str:
    lines = [f"{message['role']}: {message['content']}"]
    lines += [f"{call['function']['name']} {call['function']['arguments']}" for call in message.get("tool_calls", ())]
    return "\n".join(lines)


def _help(chat: ChatSession, _: str) -> None:
    """this"""
    for name, command in COMMANDS.items():
        chat.screen.show(f"/{name:<8} {command.__doc__}")


def _quit(_: ChatSession, __: str) -> None:
    """leave; the agent stays"""
    raise Leave


COMMANDS: dict[str, Callable[[ChatSession, str], None]] = {
    "agents": _agents,
    "agent": _agent,
    "show": _show,
    "fork": _fork,
    "evict": _evict,
    "delete": _delete,
    "stats": _stats,
    "system": _system,
    "save": _save,
    "help": _help,
    "quit": _quit,
}


def _one(rest: str, usage: str) -> str:
    if not rest or " " in rest:
        raise _Wrong(f"give it one name: {usage}")
    return rest


def _sure(chat: ChatSession) -> bool:
    known = chat.known()
    if known is None:
        return True
    question = f"delete agent {chat.agent} with {known.token_count:,} tokens, for good? [y/N] "
    try:
        return input(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False
