"""`warmkv store`: a data directory and what is in it.

Looking works beside a running server; changing takes the directory's lock, so the server has to be stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from warmkv_server.cli.connection import Json, refusing
from warmkv_server.platform import places

store = typer.Typer(help="Look at a data directory, check it, and clean it up.", no_args_is_help=True)


def _default_data_dir() -> Path:
    """As for `warmkv serve`; says so on stderr where the folder that was the default before is left behind here."""
    default = places.data_dir()
    if (earlier := places.earlier_data_dir()) is not None:
        typer.echo(f"warmkv: this is {default}; there are contexts in ./{earlier}, too: --data-dir {earlier}", err=True)
    return default


DataDir = Annotated[
    Path,
    typer.Option(
        envvar="WARMKV_DATA_DIR",
        help="The data directory. Default: that of `warmkv serve`.",
        metavar="DIR",
        default_factory=_default_data_dir,
        show_default=False,
    ),
]


@store.callback()
def _store() -> None:
    """Look at a data directory, check it, and clean it up."""


@store.command()
def ls(*, data_dir: DataDir, as_json: Json = False) -> None:
    """List the agents of a data directory, the models they belong to, and what everything takes on disk.

    Works beside a running server, and tells what is committed.
    """
    from warmkv_server.offline import show
    from warmkv_server.offline.directory import look
    from warmkv_server.offline.listing import listing
    from warmkv_server.offline.words import console

    with refusing():
        found = listing(look(data_dir))
        if as_json:
            typer.echo(json.dumps(found.as_json()))
        else:
            show.listing(console(), found)


@store.command()
def verify(
    *,
    data_dir: DataDir,
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
    with refusing(), show.progress() as watch:
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
    *,
    data_dir: DataDir,
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
    from warmkv_server.offline.words import seconds

    with refusing():
        unused_for = None if agents_unused_for is None else seconds(agents_unused_for)
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
def rebuild_index(data_dir: DataDir) -> None:
    """Build the index anew from the agents' manifests and the block files; the old one is kept beside it.

    A server does so by itself when it finds its index missing or damaged. What was committed in the last moments before
    a crash may come back as it was before. Needs the server stopped. Exit status 1 if an agent did not come back.
    """
    from warmkv_server.offline.rebuild import rebuild

    with refusing():
        found = rebuild(data_dir)
    aside = f"; the old one is {found.aside}" if found.aside is not None else ""
    typer.echo(f"rebuilt the index of {data_dir}{aside}: {found.summary()}")
    if found.left_out or found.unreadable:
        raise typer.Exit(1)
