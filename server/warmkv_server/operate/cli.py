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
    from warmkv_server.operate import show
    from warmkv_server.operate.directory import look
    from warmkv_server.operate.listing import listing

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
    """Read every block file and check it against its checksum, its name and the index.

    Works beside a running server and changes nothing, unless told to. Exit status 1 if anything is wrong.
    """
    from warmkv_server.operate import show
    from warmkv_server.operate.directory import look, take
    from warmkv_server.operate.repair import put_away
    from warmkv_server.operate.verify import verify as check

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
