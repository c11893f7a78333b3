"""`warmkv store` and `warmkv agents`: the commands of operators.

Looking works beside a running server; changing takes the directory's lock, so the server has to be stopped.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from warmkv_server.errors import OperatorError

store = typer.Typer(help="Look at a data directory, check it, and clean it up.", no_args_is_help=True)
agents = typer.Typer(help="Move agents between data directories.", no_args_is_help=True)

DataDir = Annotated[Path, typer.Option(envvar="WARMKV_DATA_DIR", help="The data directory, as for `warmkv serve`.")]
Json = Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")]
DEFAULT_DATA_DIR = Path("data")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What the operator did wrong in one sentence on stderr, and exit status 2."""
    try:
        yield
    except OperatorError as error:
        typer.echo(f"warmkv: {error}", err=True)
        raise typer.Exit(2) from None


@store.callback()
def _store() -> None:
    """Look at a data directory, check it, and clean it up."""


@agents.callback()
def _agents() -> None:
    """Move agents between data directories."""


@store.command()
def ls(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: Json = False) -> None:
    """List the agents of a data directory, the models they belong to, and what everything takes on disk.

    Works beside a running server, and tells what is committed.
    """
    from warmkv_server.offline import show
    from warmkv_server.offline.directory import look
    from warmkv_server.offline.listing import listing

    with _refusing():
        found = listing(look(data_dir))
        if as_json:
            typer.echo(json.dumps(found.as_json()))
        else:
            show.listing(show.console(), found)


@store.command()
def verify(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    quarantine: Annotated[
        bool,
        typer.Option(
            "--quarantine",
            help="Also move bad files to quarantine/ and note it in the index, so that agents compute what they lost. "
            "Needs the server stopped.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every block file and check it against its checksum, its name and the index, and so every agent's manifest.

    Works beside a running server and changes nothing, unless told to. Exit status 1 if anything is wrong.
    """
    from warmkv_server.offline import show
    from warmkv_server.offline.directory import look, take
    from warmkv_server.offline.repair import put_away
    from warmkv_server.offline.verify import verify as check

    moved: int | None = None
    with _refusing(), show.progress() as watch:
        if quarantine:
            with take(data_dir) as taken:
                report = check(lambda: taken, watch)
                moved = put_away(taken, report.bad)
        else:
            report = check(lambda: look(data_dir), watch)
    if as_json:
        typer.echo(json.dumps(show.report_json(report, moved)))
    else:
        show.report(report, moved)
    if report.problems:
        raise typer.Exit(1)


@store.command()
def gc(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    agents_unused_for: Annotated[
        str | None,
        typer.Option(help="Also delete agents that nobody used for so long, such as 30d; units s, m, h, d, w."),
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="Also delete the agents of this model and settings; the first digits of what `warmkv store ls` shows. "
            "With --agents-unused-for: those to which both apply."
        ),
    ] = None,
    pinned_too: Annotated[bool, typer.Option("--pinned-too", help="Don't spare pinned agents.")] = False,
    quarantine: Annotated[
        bool,
        typer.Option(
            "--quarantine",
            help="Also empty the quarantine, and remove damaged or replaced indexes that were put aside.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what nothing references: leftovers of crashes, and blocks of no agent. Needs the server stopped.

    Agents, of whatever model, the quarantine and indexes that were put aside stay unless an option names them.
    Says what goes, and its bytes.
    """
    from warmkv_server.offline import show
    from warmkv_server.offline.directory import take
    from warmkv_server.offline.garbage import Selection, find_waste, full_digest, remove

    with _refusing():
        unused_for = None if agents_unused_for is None else show.seconds(agents_unused_for)
        with take(data_dir) as taken:
            digest = None if fingerprint is None else full_digest(taken, fingerprint)
            selection = Selection(unused_for, digest, pinned_too, quarantine)
            waste = find_waste(taken, selection)
            if not dry_run:
                remove(taken, waste, selection)
    if as_json:
        typer.echo(json.dumps(show.waste_json(waste, dry_run)))
    else:
        show.waste(waste, dry_run)


@store.command()
def rebuild_index(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Build the index anew from the agents' manifests and the block files; the old one is kept beside it.

    A server does so by itself when it finds its index missing or damaged. What was committed in the last moments before
    a crash may come back as it was before. Needs the server stopped. Exit status 1 if an agent did not come back.
    """
    from warmkv_server.offline.rebuild import rebuild

    with _refusing():
        found = rebuild(data_dir)
    aside = f"; the old one is {found.aside}" if found.aside is not None else ""
    typer.echo(f"rebuilt the index of {data_dir}{aside}: {found.summary()}")
    if found.left_out or found.unreadable:
        raise typer.Exit(1)


Tenant = Annotated[str, typer.Option(help="Whose agent; without it that of a server without a token file.")]


@agents.command("export")
def export_agent(
    agent: Annotated[str, typer.Argument(help="The agent_id.", metavar="AGENT")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; it must not exist yet.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    tenant: Tenant = "",
) -> None:
    """Write one agent, with its context and its KV, into a single file.

    Works beside a running server, and takes the last committed context. Every block is read and checked.
    """
    from warmkv_server.offline import show
    from warmkv_server.offline.directory import look
    from warmkv_server.offline.exporting import export

    with _refusing():
        done = export(look(data_dir), tenant, agent, output)
    lost = _without_kv(done.tokens, done.usable_tokens)
    typer.echo(
        f"{output}: agent {agent} at revision {done.revision}, {done.tokens} tokens{lost}; {done.files} block files, "
        f"{show.size(done.nbytes)}"
    )


@agents.command("import")
def import_agent(
    file: Annotated[Path, typer.Argument(help="What `warmkv agents export` wrote.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    new_id: Annotated[str | None, typer.Option("--as", help="Another agent_id.", metavar="NEW_ID")] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Another tenant. Its files get other names and headers, for tenants share nothing; the KV is the same."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the agent that has this id already.")] = False,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Share the archive's KV with every agent that asks for the same tokens, as what this server computed "
            "is. Wrong KV makes their answers wrong, and no check finds it. An archive that this data directory "
            "exported is trusted without.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that will serve the directory, as for `warmkv serve`: it is loaded, and the archive has to "
            "be of it. Without --model, the archive has to be of one that the directory was served with before."
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="With --model, as for `warmkv serve`.")] = None,
    kv: Annotated[str | None, typer.Option(help="With --model, as for `warmkv serve`.")] = None,
    kv_bits: Annotated[str | None, typer.Option(help="With --model, as for `warmkv serve`.")] = None,
    kv_group_size: Annotated[str | None, typer.Option(help="With --model, as for `warmkv serve`.")] = None,
) -> None:
    """Make an exported agent one of this data directory. Needs the server stopped.

    Refused, with nothing changed, if the archive is damaged or its KV is of another model or other settings. The
    agent keeps its revision, labels, ttl and pin; a request id it answered before is not known here. Unless the archive
    is trusted, its KV serves this agent and its forks alone.
    """
    from warmkv_server import config
    from warmkv_server.offline import show
    from warmkv_server.offline.directory import is_new, look, make, take
    from warmkv_server.offline.importing import Specs, opened, require_same_model
    from warmkv_server.offline.importing import import_agent as take_in

    flags = {"adapter": adapter, "kv": kv, "kv_bits": kv_bits, "kv_group_size": kv_group_size}
    given = {name: value for name, value in flags.items() if value is not None}
    specs: Specs | None = None
    vocabulary: int | None = None
    with _refusing():
        if given and model is None:
            raise OperatorError(f"--{next(iter(given)).replace('_', '-')} goes with --model")
        with opened(file) as reader:
            told = reader.manifest
            if model is not None:
                from warmkv_server.offline.model import load

                fingerprint, specs, vocabulary = load(config.read({"model": model, "data_dir": data_dir, **given}))
                ours = require_same_model(told.fingerprint, [fingerprint], f"the model {model}")
                make(data_dir)
            else:
                served = [] if is_new(data_dir) else list(look(data_dir).fingerprints.values())
                ours = require_same_model(told.fingerprint, served, f"the data directory {data_dir}")
            with take(data_dir) as taken:
                done = take_in(
                    reader,
                    taken,
                    fingerprint=ours,
                    tenant=told.agent.tenant if tenant is None else tenant,
                    agent_id=told.agent.agent_id if new_id is None else new_id,
                    replace=replace,
                    trust=trust,
                    specs=specs,
                    vocabulary=vocabulary,
                )
    lost = _without_kv(done.tokens, done.usable_tokens)
    alone = "; for this agent and its forks alone, as this directory didn't sign the archive" * (not done.shared)
    typer.echo(
        f"agent {done.agent_id} at revision {done.revision}, {done.tokens} tokens{lost}; {done.files} block files "
        f"written, {show.size(done.nbytes)}{alone}"
    )


def _without_kv(tokens: int, usable: int) -> str:
    return f" ({tokens - usable} of them without KV, to be computed anew)" if usable < tokens else ""
