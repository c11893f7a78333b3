"""`warmkv agents`: the agents of a server that runs, and as files between data directories."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmkv_server.cli import reports
from warmkv_server.cli.archives import export_agent, import_agent
from warmkv_server.cli.bar import Bar
from warmkv_server.cli.connection import Json, on_server
from warmkv_server.errors import OperatorError
from warmkv_server.offline import words

if TYPE_CHECKING:
    from warmkv import v1
    from warmkv.client import Client

agents = typer.Typer(help="Look at a server's agents, change them, and move them as files.", no_args_is_help=True)

AgentId = Annotated[str, typer.Argument(help="The agent_id.", metavar="AGENT")]
File = Annotated[
    str, typer.Option("--file", "-f", help="A file of UTF-8 text; - reads standard input.", metavar="FILE|-")
]
Role = Annotated[str | None, typer.Option(help="The text is one chat message of this role, such as system.")]
AsChat = Annotated[
    bool, typer.Option("--chat", help='The file is JSON: a list of {"role": …, "content": …}, a conversation.')
]
Label = Annotated[list[str] | None, typer.Option(help="A label; can be given more than once.", metavar="KEY=VALUE")]
Stopped = Annotated[
    Path | None, typer.Option(help="Look into this data directory instead of asking a server.", metavar="DIR")
]

agents.command("export")(export_agent)
agents.command("import")(import_agent)


@agents.callback()
def _agents() -> None:
    """Look at a server's agents, change them, and move them as files."""


@agents.command()
@on_server
def ls(
    client: Client,
    label: Label = None,
    tier: Annotated[str | None, typer.Option(help="Only those that are hot, or warm.")] = None,
    data_dir: Stopped = None,
    as_json: Json = False,
) -> None:
    """List a server's agents, or with --data-dir those of a directory."""
    if data_dir is not None:
        if label or tier is not None:
            raise OperatorError("--label and --tier are for a server's agents; without them --data-dir lists all")
        _list_directory(data_dir, as_json)
        return
    from warmkv import v1

    tiers = {None: v1.TIER_UNSPECIFIED, "hot": v1.TIER_HOT, "warm": v1.TIER_WARM}
    if tier not in tiers:
        raise OperatorError(f"--tier can't be {tier!r}; it is hot or warm")
    found = list(client.agents(tier=tiers[tier], labels=_labels(label)))
    if as_json:
        typer.echo(reports.dumped({"agents": [reports.as_json(each) for each in found]}))
    elif found:
        words.console().print(reports.agents(found))
    else:
        typer.echo("no agents")


@agents.command()
@on_server
def show(client: Client, agent: AgentId, data_dir: Stopped = None, as_json: Json = False) -> None:
    """Say all that a server knows of an agent, or a directory with --data-dir."""
    if data_dir is not None:
        _show_in_directory(data_dir, agent, as_json)
    else:
        _tell(client.get(agent), as_json)


@agents.command()
@on_server
def prime(
    client: Client,
    agent: AgentId,
    file: File,
    role: Role = None,
    chat: AsChat = False,
    pinned: Annotated[bool | None, typer.Option("--pinned/--unpinned", help="Pin or unpin it, too.")] = None,
    ttl: Annotated[str | None, typer.Option(help="How long it lives after its last use, such as 30d.")] = None,
    label: Label = None,
    as_json: Json = False,
) -> None:
    """Make a text an agent's whole context, and compute it now. Creates the agent, or replaces what it had."""
    fields: dict[str, Any] = {"labels": _labels(label)}
    if pinned is not None:
        fields["pinned"] = pinned
    if ttl is not None:
        fields["ttl"] = _duration(ttl)
    with Bar() as bar:
        done = client.prime(agent, _content(file, role, chat), on_progress=bar.follow, **fields)
    typer.echo(reports.dumped(reports.as_json(done)) if as_json else reports.computed(done))


@agents.command()
@on_server
def extend(
    client: Client, agent: AgentId, file: File, role: Role = None, chat: AsChat = False, as_json: Json = False
) -> None:
    """Put a text behind an agent's context, and compute it now."""
    with Bar() as bar:
        done = client.extend(agent, _content(file, role, chat), on_progress=bar.follow)
    typer.echo(reports.dumped(reports.as_json(done)) if as_json else reports.computed(done))


@agents.command()
@on_server
def evict(
    client: Client,
    agent: AgentId,
    drop_page_cache: Annotated[
        bool, typer.Option("--drop-page-cache", help="Also ask the operating system to forget its files.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Drop the copy that RAM has of an agent; its next request reads the files."""
    done = client.evict(agent, drop_page_cache=drop_page_cache)
    if as_json:
        typer.echo(reports.dumped(reports.as_json(done)))
    else:
        typer.echo(f"{agent}: {words.size(done.bytes_freed)} of RAM are free; {reports.tier(done.agent.tier)} now")


@agents.command()
@on_server
def fork(
    client: Client,
    agent: AgentId,
    new: Annotated[str, typer.Argument(help="The agent_id of the fork.", metavar="NEW")],
    as_json: Json = False,
) -> None:
    """Make an agent with the context of another one. Copies no KV."""
    _tell(client.fork(agent, new), as_json)


@agents.command()
@on_server
def rm(
    client: Client,
    agent: Annotated[list[str], typer.Argument(help="One agent_id or several.", metavar="AGENT...")],
    missing: Annotated[bool, typer.Option("--allow-missing", help="Also say OK where there is no such agent.")] = False,
    as_json: Json = False,
) -> None:
    """Delete agents, for good."""
    for each in agent:
        client.delete(each, allow_missing=missing)
        if not as_json:
            typer.echo(f"{each}: deleted")
    if as_json:
        typer.echo(reports.dumped({"deleted": agent}))


@agents.command()
@on_server
def pin(
    client: Client,
    agent: AgentId,
    off: Annotated[bool, typer.Option("--off", help="Unpin it.")] = False,
    as_json: Json = False,
) -> None:
    """Keep an agent from automatic eviction and from the disk's quota."""
    from warmkv import v1

    done = client.update(v1.Agent(agent_id=agent, pinned=not off), ["pinned"])
    if as_json:
        _tell(done, as_json)
    else:
        typer.echo(f"{agent}: {'pinned' if done.pinned else 'not pinned'}")


def _tell(agent: v1.Agent, as_json: bool) -> None:
    if as_json:
        typer.echo(reports.dumped(reports.as_json(agent)))
        return
    for topic, said in reports.agent(agent):
        typer.echo(f"{topic:<12} {words.printable(said)}")


def _list_directory(data_dir: Path, as_json: bool) -> None:
    from warmkv_server.offline import show as shown
    from warmkv_server.offline.directory import look
    from warmkv_server.offline.listing import listing

    found = listing(look(data_dir))
    if as_json:
        typer.echo(json.dumps({"agents": found.as_json()["agents"]}))
    else:
        words.console().print(shown.agents(found))


def _show_in_directory(data_dir: Path, agent: str, as_json: bool) -> None:
    from warmkv_server.offline.directory import look
    from warmkv_server.offline.listing import listing

    found = [each for each in listing(look(data_dir)).as_json()["agents"] if each["agent_id"] == agent]
    if not found:
        raise OperatorError(f"there is no agent {agent!r} in {data_dir}; `warmkv agents ls --data-dir` lists all")
    for each in found:
        if as_json:
            typer.echo(json.dumps(each))
            continue
        for name, value in each.items():
            shown = words.ago(time.time() - value) if name == "last_used" else value
            typer.echo(f"{name:<13} {shown}")


def _content(file: str, role: str | None, as_chat: bool) -> v1.Content:
    """What a file says, as --role and --chat have it understood.

    Raises:
        OperatorError: it can't be read, or isn't what it is said to be.
    """
    from warmkv.client import chat, text

    if role is not None and as_chat:
        raise OperatorError("--role and --chat exclude each other: the conversation's messages have roles of their own")
    try:
        said = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        value = said.decode()
    except OSError as error:
        raise OperatorError(f"{file} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise OperatorError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not as_chat:
        return text(value) if role is None else chat((role, value))
    try:
        return chat(*((message["role"], message["content"]) for message in json.loads(value)))
    except (ValueError, TypeError, KeyError) as error:
        raise OperatorError(
            f'{file} is not a conversation in JSON, a list of {{"role": …, "content": …}}: {error}'
        ) from error


def _labels(given: list[str] | None) -> dict[str, str]:
    pairs = [each.partition("=") for each in given or ()]
    if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
        raise OperatorError(f"--label {wrong[0]!r} is not KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _duration(given: str) -> Any:
    from google.protobuf.duration_pb2 import Duration

    duration = Duration()
    duration.FromMilliseconds(round(words.seconds(given) * 1000))
    return duration
