"""The command line: `warmkv serve`, `doctor`; `chat`, `agents`, `ps`, `top` and `health`, which ask a server that runs;
`store`, `models` and `config`, which look at files; `eval`; and `bench` where the benchmark is installed.

Says what an operator did wrong in one sentence on stderr, and exits with status 2; with 1 where it is nobody's fault.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any, NoReturn

import typer

from warmkv_server.cli.agents import agents
from warmkv_server.cli.chat.command import chat
from warmkv_server.cli.config import settings as config
from warmkv_server.cli.config import told_by, with_flags
from warmkv_server.cli.data import DataDir, store
from warmkv_server.cli.fleet import fleet
from warmkv_server.cli.health import health
from warmkv_server.cli.models import models
from warmkv_server.cli.running import ps, top
from warmkv_server.cli.start_screen import StartScreen
from warmkv_server.errors import OperatorError, ServerFailed
from warmkv_server.platform.logs import log_to_stderr
from warmkv_server.platform.versions import version_of

app = typer.Typer(
    name="warmkv",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For a command whose arguments are another command line's."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_of("warmkv"))
        raise typer.Exit


@app.callback()
def _warmkv(
    _: Annotated[
        bool, typer.Option("--version", "-V", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """A gRPC model server on MLX that keeps every agent's KV cache: hot in RAM, warm on disk."""


@app.command()
@with_flags
def serve(**flags: Any) -> None:
    """Serve a model. Each option can also be set in the environment, such as WARMKV_PORT for --port."""
    # gRPC's own log tells operators nothing that isn't said better here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        settings = told_by(flags).settings
        log_to_stderr(settings.log_level, settings.log_format)
        from warmkv_server.text.launch import StartedProcess

        text = StartedProcess.first()
        from warmkv_server.app import serve as run  # imports MLX, and not before the process above is there

        with StartScreen() as screen:
            status = asyncio.run(run(settings, text, screen.serves, screen.tell, screen.hide))
    except OperatorError as error:
        _refuse(str(error))
    except ServerFailed as error:
        _refuse(str(error), status=1)
    raise typer.Exit(status)


@app.command()
def doctor(
    data_dir: DataDir,
) -> None:
    """Say what MLX computes on here, how fast, what is installed, and how much room there is."""
    from warmkv_server.platform.doctor import findings

    for name, finding in findings(data_dir):
        typer.echo(f"{name:<12} {finding}")


@app.command("eval", add_help_option=False, context_settings=_PASSED_ON)
def evaluate(context: typer.Context) -> None:
    """Measure what WarmKV does to a model's answers, and the store by itself; `warmkv eval --help` tells how."""
    from warmkv_evaluation.cli import app as evaluation

    evaluation(args=context.args, prog_name="warmkv eval")


@app.command(add_help_option=False, context_settings=_PASSED_ON)
def bench(context: typer.Context) -> None:
    """Measure a server; `warmkv bench --help` tells how."""
    try:
        from warmkv_bench.cli import app as benchmark
    except ModuleNotFoundError as error:
        _refuse(
            f"the benchmark needs {error.name}, which is not installed: in a checkout, run `pip install '.[bench]'`"
        )
    benchmark(args=context.args, prog_name="warmkv bench")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(version_of("warmkv"))


for _command in (chat, ps, top, health):
    app.command()(_command)
for _name, _group in {"agents": agents, "store": store, "models": models, "config": config, "fleet": fleet}.items():
    app.add_typer(_group, name=_name)


def _refuse(sentence: str, status: int = 2) -> NoReturn:
    typer.echo(f"warmkv: {sentence}", err=True)
    raise typer.Exit(status)
