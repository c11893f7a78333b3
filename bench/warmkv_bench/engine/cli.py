"""`warmkv bench engine`: the engine behind its socket beside mlx-lm in a process of its own."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from warmkv_bench.config import ConfigError
from warmkv_bench.engine.bench import QUICK, Plan, WrongPath
from warmkv_bench.engine.comparisons import Name
from warmkv_bench.engine.outcome import Verdict, outcomes_table
from warmkv_bench.engine.run import run_engine, write
from warmkv_bench.options import listed, usage_error
from warmkv_bench.peers.peer import PeerFailed
from warmkv_bench.spawn import ServerFailed
from warmkv_bench.terminal import Terminal


def engine(
    models: Annotated[str, typer.Option(help="builtin:tiny, random:SHAPE or folders, comma-separated.")] = (
        "builtin:tiny,random:llama-100m"
    ),
    only: Annotated[str, typer.Option(help=f"Any of {', '.join(Name)}.")] = ",".join(Name),
    quick: Annotated[bool, typer.Option("--quick", help="3 repetitions, 1,024 tokens: a look, not a result.")] = False,
    contexts: Annotated[str | None, typer.Option(help="Tokens of held contexts.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Repetitions of every comparison.")] = None,
    stock_runs: Annotated[int | None, typer.Option(min=1, help="Repetitions beside the stock BLAS.")] = None,
    peer_settings: Annotated[
        str, typer.Option(help="NAME=VALUE for mlx-lm's process, comma-separated, beside WarmKV's BLAS itself.")
    ] = "KMP_BLOCKTIME=0,MKL_CBWR=AUTO,MKL_DYNAMIC=FALSE",
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keeps written models and primed contexts for the next run.")
    ] = None,
    max_time: Annotated[float, typer.Option(metavar="SECONDS", help="No repetition begins after this.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Of prompts.")] = 0,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with 1 if a target is missed for certain.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")] = Path(
        "results"
    ),
) -> None:
    """Speed against mlx-lm in its own process: same model, same BLAS, same run, interleaved, with verdicts."""
    terminal = Terminal()
    plan = QUICK if quick else Plan()
    try:
        if contexts is not None:
            plan = replace(plan, contexts=listed("--contexts", contexts, int))
        if runs is not None:
            plan = replace(plan, runs=runs)
        if stock_runs is not None:
            plan = replace(plan, stock_runs=stock_runs)
        names = listed("--only", only, Name)
        settings = dict(_setting(each) for each in listed("--peer-settings", peer_settings, str))
        with ExitStack() as stack:
            folder = (
                cache_dir.absolute()
                if cache_dir
                else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="warmkv-bench-")))
            )
            results = asyncio.run(
                run_engine(
                    listed("--models", models, str),
                    names,
                    plan,
                    folder=folder,
                    peer_settings=settings,
                    max_time_s=max_time,
                    seed=seed,
                    say=terminal.say,
                )
            )
    except (ConfigError, PeerFailed, ServerFailed, WrongPath) as error:
        raise usage_error(str(error)) from None
    write(results, output)
    terminal.table(outcomes_table(results["outcomes"]))
    for problem in results["problems"]:
        terminal.say(f"note: {problem}")
    terminal.say(f"results and report: {output}")
    if fail and any(row["verdict"] == Verdict.FAILS for row in results["outcomes"]):
        raise typer.Exit(1)


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ConfigError(f"--peer-settings has {text!r}: it must be NAME=VALUE")
    return name, value
