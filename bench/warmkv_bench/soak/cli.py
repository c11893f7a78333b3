"""`warmkv bench soak`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from warmkv_bench.config import ConfigError
from warmkv_bench.options import DEFAULT_MODEL, ModelOption, ServerArgsOption, ServerChoice, TargetOption, usage_error
from warmkv_bench.soak import report
from warmkv_bench.soak.run import QUANTISED_TOLERANCE, UNQUANTISED_TOLERANCE, Soak, run_soak
from warmkv_bench.spawn import ServerFailed
from warmkv_bench.terminal import Terminal

SMALL = "--hot-bytes 24MiB --disk-bytes 256MiB"
"""RAM for a part of the agents only, so that they come and go."""

BREACHED = 1


def soak(
    requests: Annotated[int, typer.Option(help="Stop after so many.")] = 5000,
    agents: Annotated[int, typer.Option(help="Agents that they are asked of.")] = 200,
    seconds: Annotated[float, typer.Option(help="Stop after so many.")] = 240.0,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    replays: Annotated[int, typer.Option(help="Answers that are computed again at the end, alone.")] = 150,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Margin, in log-probability, below which an answer may part from its replay. "
            f"Default: {UNQUANTISED_TOLERANCE:g} with unquantised KV, {QUANTISED_TOLERANCE:g} with quantised."
        ),
    ] = None,
    memory: Annotated[float, typer.Option(help="Growth of the resident set that is allowed, as a part of it.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of what is asked.")] = 0,
    target: TargetOption = None,
    model: ModelOption = DEFAULT_MODEL,
    server_args: ServerArgsOption = "",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the findings go.")] = Path(
        "results"
    ),
) -> None:
    """Ask many agents random things for long, give up, evict, delete and fork meanwhile, and check what comes of it.

    No request may be stuck, no token wrong, no byte lost, and everything must come to rest. Exits with 1 otherwise.
    """
    wanted = Soak(requests, agents, seconds, concurrency, replays, tolerance, memory, seed)
    terminal = Terminal()
    try:
        choice = ServerChoice.of(target, False, model, server_args if target else f"{SMALL} {server_args}")
        findings = asyncio.run(run_soak(wanted, choice))
    except (ConfigError, ServerFailed) as error:
        raise usage_error(str(error)) from None
    report.write(findings, output)
    for table in report.tables(findings):
        terminal.table(table)
    for breach in findings.breaches[: report.MOST_BREACHES]:
        terminal.say(f"! {breach}")
    terminal.say(f"{report.verdict(findings)} Findings: {output}")
    if findings.breaches:
        raise typer.Exit(BREACHED)
