"""The command line: `warmkv serve`, `doctor`, `health`, `version`, what operators do (`store`, `agents`, `models`,
`config`), `eval`, and `bench` where the benchmark is installed.

Says what an operator did wrong in one sentence on stderr, and exits with status 2; with 1 where it is nobody's fault.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from warmkv_server.cli import config
from warmkv_server.cli import data as operate
from warmkv_server.cli.config import told_by, with_flags
from warmkv_server.cli.models import models
from warmkv_server.errors import OperatorError, ServerFailed
from warmkv_server.platform.versions import version_of

app = typer.Typer(
    name="warmkv",
    help="A gRPC model server on MLX that keeps every agent's KV cache: hot in RAM, warm on disk.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(operate.store, name="store")
app.add_typer(operate.agents, name="agents")
app.add_typer(models, name="models")
app.add_typer(config.settings, name="config")

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For a command whose arguments are another command line's."""


@app.command()
@with_flags
def serve(**flags: Any) -> None:
    """Serve a model. Each option can also be set in the environment, such as WARMKV_PORT for --port."""
    # gRPC's own log tells operators nothing that isn't said better here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        settings = told_by(flags).settings
        _log_to_stderr(settings.log_level)
        from warmkv_server.text.launch import StartedProcess

        text = StartedProcess.first()
        from warmkv_server.app import serve as run  # imports MLX, and not before the process above is there

        status = asyncio.run(run(settings, text))
    except OperatorError as error:
        _refuse(str(error))
    except ServerFailed as error:
        _refuse(str(error), status=1)
    raise typer.Exit(status)


@app.command()
def doctor(
    data_dir: Annotated[Path, typer.Option(help="The folder that contexts would be kept in.")] = Path("data"),
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
def health(
    target: Annotated[str, typer.Option(help="Address of the server, HOST:PORT.")] = "127.0.0.1:50051",
    seconds: Annotated[float, typer.Option(help="How long to wait for the answer.")] = 3.0,
) -> None:
    """Ask a server whether it serves: exit status 0 if it does, 1 if not. Needs no token."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(target) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            typer.echo(f"{target} does not answer: {error.details()}", err=True)
            raise typer.Exit(1) from None
    typer.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(version_of("warmkv"))


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _refuse(sentence: str, status: int = 2) -> NoReturn:
    typer.echo(f"warmkv: {sentence}", err=True)
    raise typer.Exit(status)
