"""`warmkv agents export` and `import`: agents as files, between data directories."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from warmkv_server.cli.connection import Json, refusing
from warmkv_server.cli.data import DataDir
from warmkv_server.errors import OperatorError
from warmkv_server.offline.words import size

Tenant = Annotated[
    str | None,
    typer.Option(
        help="Whose agent; without it that of a server without a token file. With --all: only these; else all tenants'."
    ),
]


def export_agent(
    agent: Annotated[str | None, typer.Argument(help="The agent_id.", metavar="AGENT")] = None,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write, or with --all the folder; no file may exist yet.")
    ],
    every: Annotated[bool, typer.Option("--all", help="Every agent of the directory, each into a file.")] = False,
    data_dir: DataDir,
    tenant: Tenant = None,
    as_json: Json = False,
) -> None:
    """Write an agent, with its context and its KV, into a single file.

    Works beside a running server, and takes the last committed context. Every block is read and checked.
    """
    from warmkv_server.offline.directory import look
    from warmkv_server.offline.exporting import export, file_names

    with refusing():
        if (agent is None) != every:
            raise OperatorError("give either an agent's id or --all")
        view = look(data_dir)
        files = {(tenant or "", agent): output} if agent is not None else file_names(view, output, tenant)
        for (owner, agent_id), file in files.items():
            done = export(view, owner, agent_id, file)
            if as_json:
                typer.echo(json.dumps({"tenant": owner, "agent_id": agent_id, "file": str(file), **asdict(done)}))
                continue
            lost = _without_kv(done.tokens, done.usable_tokens)
            typer.echo(
                f"{file}: agent {agent_id} at revision {done.revision}, {done.tokens} tokens{lost}; {done.files} block "
                f"files, {size(done.nbytes)}"
            )


def import_agent(
    file: Annotated[Path, typer.Argument(help="What `warmkv agents export` wrote.")],
    *,
    data_dir: DataDir,
    as_json: Json = False,
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
    from warmkv_server.offline.directory import is_new, look, make, take
    from warmkv_server.offline.importing import Specs, opened, require_same_model
    from warmkv_server.offline.importing import import_agent as take_in

    flags = {"adapter": adapter, "kv": kv, "kv_bits": kv_bits, "kv_group_size": kv_group_size}
    given = {name: value for name, value in flags.items() if value is not None}
    specs: Specs | None = None
    vocabulary: int | None = None
    with refusing():
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
    if as_json:
        typer.echo(json.dumps(asdict(done)))
        return
    lost = _without_kv(done.tokens, done.usable_tokens)
    alone = "; for this agent and its forks alone, as this directory didn't sign the archive" * (not done.shared)
    typer.echo(
        f"agent {done.agent_id} at revision {done.revision}, {done.tokens} tokens{lost}; {done.files} block files "
        f"written, {size(done.nbytes)}{alone}"
    )


def _without_kv(tokens: int, usable: int) -> str:
    return f" ({tokens - usable} of them without KV, to be computed anew)" if usable < tokens else ""
