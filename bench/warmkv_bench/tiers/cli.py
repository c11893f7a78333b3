"""`warmkv bench tiers`: a request on a context in RAM, on disk, and on disk with the page cache dropped."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from warmkv_bench.config import ConfigError
from warmkv_bench.environment import environment
from warmkv_bench.options import (
    DEFAULT_MODEL,
    ModelOption,
    ServerArgsOption,
    ServerChoice,
    SpawnOption,
    TargetOption,
    listed,
    usage_error,
)
from warmkv_bench.prompts import Prompts
from warmkv_bench.report import markdown_table
from warmkv_bench.results import replace_file
from warmkv_bench.spawn import ServerFailed
from warmkv_bench.terminal import Terminal
from warmkv_bench.tiers.figures import TierFigures, figures, tiers_table
from warmkv_bench.tiers.pairs import COMPLETE, Tiers, TiersConfig

REQUEST_TIMEOUT_S = 3600.0
INTERRUPTED = 130


def tiers(
    contexts: Annotated[str, typer.Option(help="Tokens of the held context, comma-separated.")] = (
        "1024,4096,8192,16384,32768"
    ),
    pairs: Annotated[int, typer.Option(help="Pairs of a hot and a warm sample for each context.")] = 20,
    dropped: Annotated[int, typer.Option(help="Samples with the page cache dropped for each context.")] = 7,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 also if a promised limit is passed.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the primed agent on the server, for another run with the same --seed.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of prompts.")] = 0,
    target: TargetOption = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Data directory of --target, for plain reads of its files.")
    ] = None,
    spawn: SpawnOption = False,
    model: ModelOption = DEFAULT_MODEL,
    server_args: ServerArgsOption = "",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")] = Path(
        "results"
    ),
) -> None:
    """The same request on a context in RAM and on disk, in turns; then with the page cache dropped.

    Results are written after each size, so that a run that is cut off leaves what it has. Exits with 1 if any sample is
    invalid.
    """
    terminal = Terminal()
    try:
        config = TiersConfig(listed("--contexts", contexts, int), pairs, dropped, seed=seed, keep=keep)
        server = ServerChoice.of(target, spawn, model, server_args)
        good = asyncio.run(_measure(config, server, data_dir, output, terminal, check=check))
    except KeyboardInterrupt:
        terminal.say(f"interrupted; what was measured is in {output}")
        raise typer.Exit(INTERRUPTED) from None
    except (ConfigError, ServerFailed) as error:
        raise usage_error(str(error)) from None
    if not good:
        raise typer.Exit(1)


async def _measure(
    config: TiersConfig,
    server: ServerChoice,
    data_dir: Path | None,
    output: Path,
    terminal: Terminal,
    *,
    check: bool = False,
) -> bool:
    async with server.connected(REQUEST_TIMEOUT_S) as target:
        info = await target.client.info()
        where = environment(info, target.data_dir or data_dir, server.arguments)
        run = Tiers(target.client, info, config, target.data_dir or data_dir)
        prompts = await Prompts.of_server(target.client, config.seed)
        await run.run(prompts, terminal.say, lambda: write(run, config, where, output))
    found = figures(run.samples)
    misses = _misses(found)
    invalid = [sample for sample in run.samples if sample.invalid_reason is not None]
    write(run, config, where, output)
    terminal.table(tiers_table(found))
    for note in _notes(run, misses):
        terminal.say(f"! {note}")
    terminal.say(f"results and report: {output}")
    return not (invalid or run.problems or (check and misses))


def write(run: Tiers, config: TiersConfig, where: dict[str, Any], folder: Path) -> None:
    """Writes tiers.json, with every sample so far, and tiers.md; a reader sees old or new files, never half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    found = figures(run.samples)
    misses = _misses(found)
    results = {
        "schema_version": 1,
        "status": run.status,
        "environment": where,
        "config": asdict(config),
        "figures": [asdict(one) for one in found],
        "misses": misses,
        "problems": run.problems,
        "samples": [asdict(sample) for sample in run.samples],
    }
    replace_file(folder / "tiers.json", json.dumps(results) + "\n")
    title = f"# Tiers, {where['server']['model_id']}, {where['time']}"
    notes = [f"- {note}" for note in _notes(run, misses)]
    if run.status != COMPLETE:
        notes.append(f"- {run.status}: {len(found)} of {len(config.contexts)} sizes")
    replace_file(folder / "tiers.md", "\n\n".join([title, markdown_table(tiers_table(found)), *notes]) + "\n")


def _misses(found: list[TierFigures]) -> list[str]:
    return [miss for one in found for miss in one.misses]


def _notes(run: Tiers, misses: list[str]) -> list[str]:
    invalid = [sample.invalid_reason for sample in run.samples if sample.invalid_reason is not None]
    found = [*run.problems, *(f"limit passed at {miss}" for miss in misses)]
    return [*found, f"{len(invalid)} invalid samples, such as: {invalid[0]}"] if invalid else found
