"""How people see what is in a data directory."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from warmkv_server.kv.index.index import Agent
from warmkv_server.offline.findings import Report
from warmkv_server.offline.garbage import Waste
from warmkv_server.offline.listing import Listing
from warmkv_server.offline.words import ago, size

SHORT = 12
"""Digits of a digest that a person gets to see."""


def listing(console: Console, found: Listing) -> None:
    if found.agents:
        console.print(agents(found))
    if found.models:
        console.print(_models(found))
    unreferenced = f", {size(found.unreferenced_bytes)} of them referenced by no agent" * bool(found.unreferenced_bytes)
    hidden = f"; {found.hidden_agents} contexts of requests without an agent with {size(found.hidden_bytes)}"
    hidden *= bool(found.hidden_agents)
    aside = f"; indexes that were put aside {size(found.aside_bytes)}" * bool(found.aside_bytes)
    console.print(
        f"{found.data_dir}: {len(found.agents)} agents; {found.block_files} block files with "
        f"{size(found.block_bytes)}{unreferenced}{hidden}; "
        f"quarantine {found.quarantine_files} files with {size(found.quarantine_bytes)}; "
        f"{found.manifest_files} manifests with {size(found.manifest_bytes)}; "
        f"index {size(found.index_bytes)}{aside}",
        soft_wrap=True,
    )


def agents(found: Listing) -> Table:
    table = Table(box=None, header_style="bold")
    tenants = any(agent.tenant for agent in found.agents)
    if tenants:
        table.add_column("tenant", overflow="fold")
    table.add_column("agent", overflow="fold")
    for name in ("tokens", "revision", "on disk", "shared", "pinned", "last used"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fingerprint", no_wrap=True)
    for agent in found.agents:
        lost = agent.tokens - agent.usable_tokens
        table.add_row(
            *([agent.tenant] if tenants else []),
            agent.agent_id,
            f"{agent.tokens}" + (f" ({lost} without KV)" if lost else ""),
            str(agent.revision),
            size(agent.disk_bytes),
            size(agent.shared_bytes),
            "yes" if agent.pinned else "",
            ago(time.time() - agent.last_used),
            agent.fingerprint[:SHORT],
        )
    return table


def _models(found: Listing) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("fingerprint", "weights", "KV bits", "data type"):
        table.add_column(name)
    for name in ("agents", "files", "on disk"):
        table.add_column(name, justify="right")
    for model in found.models:
        table.add_row(
            model.fingerprint[:SHORT],
            model.fields.get("weights", "")[:SHORT],
            model.fields.get("kv_bits", ""),
            model.fields.get("dtype", ""),
            str(model.agents),
            str(model.files),
            size(model.disk_bytes),
        )
    return table


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Iterable[Path]], Iterable[Path]]]:
    """Gives a function that passes on the files it is given and shows on a terminal's stderr how many are done."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        yield lambda paths: bar.track(list(paths), description="reading")


def report(found: Report, moved: int | None) -> None:
    """
    Args:
        moved: files put into quarantine; None if that wasn't asked for.
    """
    for problem in found.problems:
        typer.echo(f"{problem.trouble}: {problem.subject}: {problem.detail}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    wrong = f"{len(found.problems)} problem{'s' * (len(found.problems) > 1)}" if found.problems else "nothing is wrong"
    away = f"; moved to quarantine: {moved}" if moved is not None else ""
    typer.echo(
        f"{found.files} block files with {size(found.nbytes)}, {found.manifests} manifests and {found.agents} agents: "
        f"{wrong}{away}"
    )


def report_json(found: Report, moved: int | None) -> dict[str, Any]:
    return {
        "files": found.files,
        "bytes": found.nbytes,
        "agents": found.agents,
        "manifests": found.manifests,
        "problems": [asdict(problem) for problem in found.problems],
        "notes": found.notes,
        "quarantined": moved,
    }


def waste(found: Waste, dry_run: bool) -> None:
    would, gone = ("would ", "would be freed") if dry_run else ("", "freed")
    for agent in found.agents:
        used = ago(found.now - agent.last_used)
        typer.echo(f"{would}delete agent {_named(agent)}: {len(agent.tokens)} tokens, last used {used}")
    for agent in found.kept:
        typer.echo(f"keep agent {_named(agent)}, which is pinned; --pinned-too doesn't spare it")
    for what, files in _kinds(found).items():
        if files:
            typer.echo(f"{would}remove {what}: {len(files)} with {size(sum(files.values()))}")
    typer.echo(f"{size(found.nbytes)} {gone}")


def waste_json(found: Waste, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "bytes": found.nbytes,
        "agents": [{"tenant": agent.tenant, "agent_id": agent.agent_id} for agent in found.agents],
        "kept_pinned": [{"tenant": agent.tenant, "agent_id": agent.agent_id} for agent in found.kept],
        "files": {what: {"count": len(files), "bytes": sum(files.values())} for what, files in _kinds(found).items()},
    }


def _kinds(found: Waste) -> dict[str, dict[Path, int]]:
    return {
        "temporary files": found.temporary,
        "block files that the index doesn't know": found.unknown,
        "block files that no agent references": found.blocks,
        "files in quarantine": found.quarantine,
        "files of indexes that were put aside": found.aside,
    }


def _named(agent: Agent) -> str:
    return f"{agent.agent_id!r}" + (f" of tenant {agent.tenant!r}" if agent.tenant else "")
