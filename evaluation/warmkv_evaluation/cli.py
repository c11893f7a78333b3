"""`warmkv eval`: what quantised KV costs in quality, and what the store costs in bytes and time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from warmkv_server.errors import OperatorError

app = typer.Typer(
    help="Evaluate what WarmKV does to a model's answers.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def evaluate() -> None:
    """Evaluate what WarmKV does to a model's answers."""


@app.command()
def kv(
    model: Annotated[str, typer.Option(help="As for `warmkv serve`.")] = "builtin:tiny",
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text to score; by default the language reference and programs of this Python."),
    ] = None,
    contexts: Annotated[str, typer.Option(help="Tokens of context, comma-separated.")] = "1024,4096",
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="A way of storing KV to compare with unquantised KV, as for `warmkv serve`; can be given several "
            "times. By default near-exact, quality, compact and affine4."
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Values that share a scale.")] = 64,
    windows: Annotated[int, typer.Option(min=2, help="Pieces of the text for each context length.")] = 8,
    scored: Annotated[int, typer.Option(min=2, help="Tokens scored behind each context.")] = 256,
    asked: Annotated[
        int, typer.Option(min=0, help="Contexts with ten facts each that are asked for, for each context length.")
    ] = 4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where results, table and picture go.")
    ] = None,
) -> None:
    """What stored KV costs in quality, each context read back from real block files.

    Perplexity, KL divergence (its mean, median and 99th percentile), the share of positions with the same greedy token,
    and recall of facts. A row for each context length and way of storing; intervals are of 95%, by paired bootstrap
    over the windows. The text is none that constants of codecs were computed from.
    """
    from warmkv_evaluation import kv_report
    from warmkv_evaluation.kv import Quality
    from warmkv_evaluation.kv import evaluate as run
    from warmkv_evaluation.windows import read_text

    async def report() -> list[Quality]:
        found: list[Quality] = []
        results = run(
            model,
            read_text(text),
            contexts=_numbers("--contexts", contexts),
            kv=kv or ["near-exact", "quality", "compact", "affine4"],
            group_size=group_size,
            windows=windows,
            scored=scored,
            asked=asked,
        )
        for line in kv_report.HEAD:
            typer.echo(line)
        async for row in results:
            found.append(row)
            typer.echo(kv_report.row(row))
        return found

    try:
        results = asyncio.run(report())
    except OperatorError as error:
        typer.echo(f"warmkv: {error}", err=True)
        raise typer.Exit(2) from None
    if output is not None:
        kv_report.write(model, results, output)


@app.command()
def store(
    parts: Annotated[str, typer.Option(help="Any of growth, load, rest, save; comma-separated.")] = (
        "growth,load,rest,save"
    ),
    contexts: Annotated[str, typer.Option(help="Tokens of the contexts that are loaded.")] = "4096,32768",
    rest_tokens: Annotated[int, typer.Option(min=256, help="Tokens of the contexts at rest.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="Loads of each kind.")] = 15,
    commits: Annotated[int, typer.Option(min=1, help="Commits timed on a short and on a long context, each.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Saves beside a decoding agent.")] = 20,
    data_dir: Annotated[
        Path, typer.Option(help="A folder on the disk that matters; temporary folders are made in it.")
    ] = Path(),
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")] = Path(
        "results"
    ),
) -> None:
    """The store by itself: write amplification, commit times, load throughput, bytes at rest, saves beside decoding.

    KV of the 8B shape and others is noise of the right size, so no weights are needed. The 8B shape at 32K takes 1.2 GB
    of disk at a time and three times that of RAM.
    """
    from warmkv_evaluation.store import Extent, Part, measure, write

    try:
        chosen = [Part(name) for name in _known("--parts", parts, list(Part))]
        extent = Extent(
            contexts=tuple(_numbers("--contexts", contexts)),
            rest_tokens=rest_tokens,
            repeats=repeats,
            commits=commits,
            rounds=rounds,
        )
        report = asyncio.run(measure(chosen, extent, data_dir, typer.echo))
    except OperatorError as error:
        typer.echo(f"warmkv: {error}", err=True)
        raise typer.Exit(2) from None
    for title, body in report.sections():
        typer.echo(f"\n{title}\n\n{body}")
    write(report, output)


def _numbers(option: str, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise OperatorError(f"{option} takes whole numbers separated by commas, not {value!r}") from None


def _known(option: str, value: str, known: list[str]) -> list[str]:
    names = value.split(",")
    for name in names:
        if name not in known:
            raise OperatorError(f"{option} has {name!r}; it can be any of {', '.join(known)}")
    return names
