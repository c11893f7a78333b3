"""`warmkv bench workload`: one command for each workload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from warmkv_bench.config import ConfigError
from warmkv_bench.options import (
    DEFAULT_MODEL,
    ModelOption,
    ServerArgsOption,
    ServerChoice,
    SpawnOption,
    TargetOption,
    usage_error,
)
from warmkv_bench.prompts import Prompts
from warmkv_bench.spawn import ServerFailed
from warmkv_bench.terminal import Terminal
from warmkv_bench.workloads.conversation import Conversation, Loop
from warmkv_bench.workloads.replay import Replay
from warmkv_bench.workloads.round_robin import RoundRobin
from warmkv_bench.workloads.run import REQUEST_TIMEOUT_S, Workload, parameters_of, run_workload, show, write
from warmkv_bench.workloads.shared_prompt import SharedPrompt
from warmkv_bench.workloads.trace import TraceError, read_trace
from warmkv_bench.workloads.turns import WorkloadResult

app = typer.Typer(help="Workloads beyond the matrix.", no_args_is_help=True)

OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")]
SeedOption = Annotated[int, typer.Option(help="Of prompts, times and order.")]
OUTPUT = Path("results")


@app.command(name="round-robin")
def round_robin(
    agents: Annotated[int, typer.Option(help="Agents that are visited in turn.")] = 8,
    resident: Annotated[int, typer.Option(help="How many of them fit into RAM.")] = 4,
    context: Annotated[int, typer.Option(help="Tokens of each agent's context.")] = 4096,
    laps: Annotated[int, typer.Option(help="Times around, with loads and without.")] = 3,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 2,
    suffix_tokens: Annotated[int, typer.Option(help="New tokens of each request.")] = 32,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    seed: SeedOption = 0,
    model: ModelOption = DEFAULT_MODEL,
    server_args: ServerArgsOption = "",
    output: OutputOption = OUTPUT,
) -> None:
    """More agents than RAM holds: does the reload hide behind other agents' decoding? Starts its own server."""

    async def measure() -> WorkloadResult:
        workload = RoundRobin(agents, resident, context, laps, concurrency, suffix_tokens, output_tokens)
        sizing = ServerChoice.of(None, True, model, server_args)
        async with sizing.connected(REQUEST_TIMEOUT_S) as target:
            hot_bytes = await workload.hot_bytes(target.client, await Prompts.of_server(target.client, seed))
        server = ServerChoice.of(None, True, model, f"{server_args} --hot-bytes {hot_bytes}")
        parameters = {**parameters_of(workload, seed), "hot_bytes": hot_bytes}
        async with server.connected(REQUEST_TIMEOUT_S) as target:
            return await run_workload("round-robin", workload, parameters, target, server, seed)

    _run(measure, output)


@app.command(name="shared-prompt")
def shared_prompt(
    agents: Annotated[int, typer.Option(help="Agents with the same system prompt.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the system prompt.")] = 4096,
    question_tokens: Annotated[int, typer.Option(help="Tokens of each agent's own question.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    concurrency: Annotated[int, typer.Option(help="Agents that start at once, after the first.")] = 1,
    seed: SeedOption = 0,
    target: TargetOption = None,
    spawn: SpawnOption = False,
    model: ModelOption = DEFAULT_MODEL,
    server_args: ServerArgsOption = "",
    output: OutputOption = OUTPUT,
) -> None:
    """One system prompt for many agents: time and disk that sharing saves."""
    workload = SharedPrompt(agents, prompt_tokens, question_tokens, output_tokens, concurrency)
    _run_on_server("shared-prompt", lambda _: workload, seed, (target, spawn, model, server_args), output)


@app.command()
def conversation(
    agents: Annotated[int, typer.Option(help="Conversations at once.")] = 4,
    turns: Annotated[int, typer.Option(help="Turns of each.")] = 8,
    first_tokens: Annotated[int, typer.Option(help="Length of the opening message.")] = 1024,
    turn_tokens: Annotated[int, typer.Option(help="Length of each later message.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    loop: Annotated[Loop, typer.Option(help="What decides when the next turn comes.")] = Loop.CLOSED,
    think: Annotated[float, typer.Option(metavar="SECONDS", help="Mean time to think; closed loop.")] = 1.0,
    rate: Annotated[float, typer.Option(metavar="TURNS/S", help="Turns a second of all agents; open loop.")] = 1.0,
    seed: SeedOption = 0,
    target: TargetOption = None,
    spawn: SpawnOption = False,
    model: ModelOption = DEFAULT_MODEL,
    server_args: ServerArgsOption = "",
    output: OutputOption = OUTPUT,
) -> None:
    """Conversations with time to think, closed or open loop."""

    def make(_: int) -> Conversation:
        return Conversation(agents, turns, first_tokens, turn_tokens, output_tokens, loop, think, rate, seed)

    _run_on_server("conversation", make, seed, (target, spawn, model, server_args), output)


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace in Mooncake's JSONL form.")],
    limit: Annotated[int | None, typer.Option(help="Only the first requests.")] = None,
    time_scale: Annotated[float, typer.Option(min=0.0, help="0.5 sends twice as fast.")] = 1.0,
    length_scale: Annotated[float, typer.Option(min=0.002, max=1.0, help="0.25: a quarter of all lengths.")] = 1.0,
    seed: SeedOption = 0,
    target: TargetOption = None,
    spawn: SpawnOption = False,
    model: ModelOption = DEFAULT_MODEL,
    server_args: ServerArgsOption = "",
    output: OutputOption = OUTPUT,
) -> None:
    """Replay a trace; hit ratio against a cache that forgets nothing."""
    try:
        requests = read_trace(file, limit, time_scale, length_scale)
    except TraceError as error:
        raise usage_error(str(error)) from None
    parameters = {"file": file.name, "limit": limit, "time_scale": time_scale, "length_scale": length_scale}
    server = (target, spawn, model, server_args)
    _run_on_server("trace", lambda limit: Replay(requests, limit), seed, server, output, parameters)


def _run_on_server(
    name: str,
    make: Callable[[int], Workload],
    seed: int,
    server_options: tuple[str | None, bool, str, str],
    output: Path,
    parameters: dict[str, Any] | None = None,
) -> None:
    """Runs the workload that `make` builds for the server's context limit."""

    async def measure() -> WorkloadResult:
        server = ServerChoice.of(*server_options)
        async with server.connected(REQUEST_TIMEOUT_S) as target:
            workload = make((await target.client.info()).context_limit)
            shown = {**parameters, "seed": seed} if parameters is not None else parameters_of(workload, seed)
            return await run_workload(name, workload, shown, target, server, seed)

    _run(measure, output)


def _run(measure: Callable[[], Coroutine[Any, Any, WorkloadResult]], output: Path) -> None:
    try:
        result = asyncio.run(measure())
    except (ConfigError, ServerFailed) as error:
        raise usage_error(str(error)) from None
    write(result, output)
    show(result, Terminal(), output)
    if result.problems:
        raise typer.Exit(1)
