"""Runs small matrices against a scripted server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.bench.scripted import Bug, ScriptedServer, serving
from warmkv_bench.config import MatrixConfig, Mode, State
from warmkv_bench.options import ServerChoice
from warmkv_bench.results import Results
from warmkv_bench.run import run_matrix
from warmkv_bench.terminal import Terminal

SMALL = MatrixConfig(
    contexts=(64, 256),
    states=(State.COLD, State.WARM, State.HOT),
    modes=(Mode.STREAMING,),
    runs=1,
    output_tokens=8,
    request_timeout_s=120.0,
)


async def measured(
    folder: Path,
    bug: Bug = Bug.NONE,
    *,
    config: MatrixConfig = SMALL,
    servicer: ScriptedServer | None = None,
    **changes: object,
) -> tuple[bool, Results]:
    """Runs a matrix; returns whether the benchmark trusts it, and the results as they were written."""
    async with serving(servicer or ScriptedServer(bug)) as address:
        server = ServerChoice(address, None)
        chosen = replace(config, **changes)  # type: ignore[arg-type]
        good = await run_matrix(chosen, server, folder, Terminal(), resume=False, dry_run=False)
    return good, Results.read(folder)
