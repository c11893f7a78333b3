"""The command line: `warmkv bench`, also `python -m warmkv_bench`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from warmkv_bench.compare import changes, changes_table, differences
from warmkv_bench.config import ConfigError, Isolation, MatrixConfig, Mode, State
from warmkv_bench.engine.cli import engine
from warmkv_bench.environment import model_note
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
from warmkv_bench.peers.cli import peers
from warmkv_bench.presets import PRESETS, Preset
from warmkv_bench.results import Results, ResultsError
from warmkv_bench.run import report, run_matrix
from warmkv_bench.soak.cli import soak
from warmkv_bench.spawn import ServerFailed
from warmkv_bench.speculate import speculate
from warmkv_bench.terminal import Terminal
from warmkv_bench.tiers.cli import tiers
from warmkv_bench.workloads.cli import app as workloads

INVALID, INTERRUPTED = 1, 130

app = typer.Typer(
    help="Measure a WarmKV server, and prove what was measured.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(workloads, name="workload")
app.command()(peers)
app.command()(soak)
app.command()(tiers)
app.command()(speculate)
app.command()(engine)


@app.command()
def run(
    preset: Annotated[Preset, typer.Option(help="Choices for all that is not given.")] = Preset.QUICK,
    contexts: Annotated[str | None, typer.Option(help="Tokens of the held prefix, comma-separated.")] = None,
    states: Annotated[str | None, typer.Option(help=f"Any of {', '.join(State)}.")] = None,
    modes: Annotated[str | None, typer.Option(help=f"Any of {', '.join(Mode)}.")] = None,
    runs: Annotated[int | None, typer.Option(help="Repetitions of everything.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Samples of each warm or hot state in one run.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Requests released together, comma-separated.")] = None,
    concurrency: Annotated[
        bool | None, typer.Option("--concurrency/--no-concurrency", help="Also a pair of cold prefills together.")
    ] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Length of every answer.")] = None,
    isolation: Annotated[Isolation | None, typer.Option(help="Fork one primed agent, or prime every sample.")] = None,
    cross_check: Annotated[
        bool | None, typer.Option("--cross-check/--no-cross-check", help="Compare fork with strict isolation.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts and order.")] = None,
    max_time: Annotated[float | None, typer.Option(metavar="SECONDS", help="Stop before this is passed.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")] = Path(
        "results"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Calibrate, print the plan, and stop.")] = False,
    target: TargetOption = None,
    spawn: SpawnOption = False,
    model: ModelOption = DEFAULT_MODEL,
    server_args: ServerArgsOption = "",
) -> None:
    """Measure contexts x states x modes x runs.

    Exits with 1 if any sample is invalid, 2 on a wrong option or a server that does not start, 130 after Ctrl-C.
    """
    given: dict[str, Any] = {
        "contexts": None if contexts is None else _checked(listed, "--contexts", contexts, int),
        "states": None if states is None else _checked(listed, "--states", states, State),
        "modes": None if modes is None else _checked(listed, "--modes", modes, Mode),
        "runs": runs,
        "repeats": repeats,
        "batch_sizes": None if batch_sizes is None else _checked(listed, "--batch-sizes", batch_sizes, int),
        "concurrency": concurrency,
        "output_tokens": output_tokens,
        "isolation": isolation,
        "cross_check": cross_check,
        "seed": seed,
        "max_time_s": max_time,
    }
    chosen = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    config = _checked(MatrixConfig, **chosen)
    server = _checked(ServerChoice.of, target, spawn, model, server_args)
    terminal = Terminal()
    try:
        good = asyncio.run(run_matrix(config, server, output, terminal, resume=resume, dry_run=dry_run))
    except KeyboardInterrupt:
        terminal.say(f"interrupted; what was measured is in {output}")
        raise typer.Exit(INTERRUPTED) from None
    except (ConfigError, ServerFailed, ResultsError) as error:
        raise usage_error(str(error)) from None
    if not good:
        raise typer.Exit(INVALID)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(metavar="A", help="results.json of the old run, or its folder.")],
    new: Annotated[Path, typer.Argument(metavar="B", help="The same of the new run.")],
    tolerance: Annotated[float, typer.Option(metavar="PERCENT", help="A difference that does not matter.")] = 5.0,
    fail_if_slower: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Exit with 1 if any latency grew by more than this.")
    ] = None,
) -> None:
    """Compare two runs: ratio of medians with its interval, and a verdict."""
    allowed = (tolerance if fail_if_slower is None else fail_if_slower) / 100
    try:
        before, after = Results.read(old), Results.read(new)
    except ResultsError as error:
        raise usage_error(str(error)) from None
    terminal = Terminal()
    noise = dict.fromkeys(filter(None, (model_note(before.environment), model_note(after.environment))))
    for note in (*noise, *differences(before, after)):
        terminal.say(f"note: {note}")
    found = changes(before, after, allowed)
    terminal.table(changes_table(found))
    if fail_if_slower is not None and any(change.regressed for change in found):
        raise typer.Exit(INVALID)


@app.command(name="report")
def report_again(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
) -> None:
    """Write report.md, report.html and the plots of a run anew from its results.json."""
    try:
        report(Results.read(folder), folder)
    except ResultsError as error:
        raise usage_error(str(error)) from None


def _checked(make: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return make(*args, **kwargs)
    except ConfigError as error:
        raise usage_error(str(error)) from None
