"""`warmkv fleet`: several servers that share their agents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from warmkv_server.cli.connection import refusing

fleet = typer.Typer(help="Several servers that share their agents.", no_args_is_help=True)


@fleet.callback()
def _fleet() -> None:
    """Several servers that share their agents."""


@fleet.command()
def envoy(
    *,
    servers: Annotated[
        list[str],
        typer.Option(
            "--server",
            help="A server, once for each. Agents are assigned by its name; without one, by its address.",
            metavar="[NAME=]HOST:PORT",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for Envoy's files.", metavar="DIR")],
    draining: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a server to lead agents away from, while what is at work there ends.", metavar="NAME"
        ),
    ] = None,
    listen: Annotated[str, typer.Option(help="Where clients come.", metavar="HOST:PORT")] = "127.0.0.1:50050",
    admin: Annotated[
        str | None, typer.Option(help="Where Envoy answers its operator. Default: nowhere.", metavar="HOST:PORT")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain for clients, in PEM form; needs --tls-key.", metavar="FILE")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key in PEM form.", metavar="FILE")] = None,
    server_ca: Annotated[
        Path | None,
        typer.Option(
            help="Certificates that the servers' own are checked against. Default: they have none.", metavar="FILE"
        ),
    ] = None,
    insecure_bind: Annotated[
        bool, typer.Option("--insecure-bind", help="Listen for other machines without TLS.")
    ] = False,
) -> None:
    """Write the configuration of an Envoy that leads each agent to its server.

    Run it again when servers come or go: a running Envoy takes the new list.
    """
    from dataclasses import replace

    from warmkv_server.contract.settings import LOOPBACK
    from warmkv_server.errors import OperatorError
    from warmkv_server.router.envoy import Address, Member, PemFiles, Router

    with refusing():
        members = [Member.read(text) for text in servers]
        if unknown := sorted({*(draining or ())} - {member.name for member in members}):
            raise OperatorError(f"--draining {unknown[0]} is the name of no --server")
        if (tls_cert is None) != (tls_key is None):
            raise OperatorError("--tls-cert and --tls-key need each other")
        at = Address.read(listen)
        if at.host not in LOOPBACK and tls_cert is None and not insecure_bind:
            raise OperatorError(
                f"--listen {listen} would serve other machines without TLS: give --tls-cert and --tls-key, or say "
                "--insecure-bind"
            )
        router = Router(
            [replace(member, draining=member.name in (draining or ())) for member in members],
            at,
            Address.read(admin) if admin is not None else None,
            PemFiles(tls_cert.absolute(), tls_key.absolute()) if tls_cert is not None and tls_key is not None else None,
            server_ca.absolute() if server_ca is not None else None,
        )
        for path in router.write(out):
            typer.echo(path)
