"""One `warmkv bench run` from its start to its report."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path

from warmkv_bench.config import ConfigError, MatrixConfig, State, prefix_tokens
from warmkv_bench.environment import environment
from warmkv_bench.html import write_page
from warmkv_bench.matrix import Matrix
from warmkv_bench.options import ServerChoice
from warmkv_bench.plots import write_plots
from warmkv_bench.prompts import Prompts
from warmkv_bench.report import notes, verdict_line, write_markdown
from warmkv_bench.results import FILE_NAME, Results
from warmkv_bench.rounds import RoundRunner
from warmkv_bench.summary import summarise
from warmkv_bench.tables import all_tables, invalid_table
from warmkv_bench.terminal import Terminal, duration, plan_table


async def run_matrix(
    config: MatrixConfig,
    server: ServerChoice,
    folder: Path,
    terminal: Terminal,
    *,
    resume: bool,
    dry_run: bool,
) -> bool:
    """Calibrates, prints the plan, measures it and writes the report; returns whether all of it can be trusted.

    Raises:
        ConfigError: the server can't run this matrix, or --output holds another run.
        ServerFailed: the server did not start, or died; what was measured until then is in `folder`.
    """
    if State.RESTART in config.states and server.address is not None:
        raise ConfigError("--states has restart, which needs a server that the benchmark starts: leave out --target")
    unfinished = _unfinished(config, folder) if resume else None
    async with server.connected(config.request_timeout_s) as target:
        info = await target.client.info()
        for context in config.contexts:
            prefix_tokens(context, config, info.context_limit)
        leftovers = await target.client.delete_leftovers()
        if leftovers:
            terminal.say(f"deleted {leftovers} agents that an earlier benchmark left on the server")
        where = environment(info, target.data_dir, server.arguments)
        results = unfinished or Results(where, config, secrets.token_hex(4))
        if results.environment["server"]["fingerprint"] != info.fingerprint:
            raise ConfigError(f"--resume: {folder} was measured on another model; choose another --output")
        prompts = await Prompts.of_server(target.client, config.seed)
        runner = RoundRunner(target, config, info, prompts, results.run_id)
        matrix = Matrix(config, results, runner, folder, terminal)
        terminal.say(f"{info.model_id} on {info.device} {info.blas}; calibrating")
        todo = await matrix.calibrate()
        terminal.table(plan_table(todo))
        if dry_run:
            return not results.problems
        try:
            await matrix.run(todo)
        finally:
            report(results, folder)
            summarise_on(terminal, results, folder)
    return results.good


def report(results: Results, folder: Path) -> None:
    """Summarises the samples, and writes plots, report.md and report.html beside results.json."""
    results.summary = summarise(results)
    results.write(folder)
    plots = write_plots(results, folder)
    write_markdown(results, folder, [plot.name for plot in plots])
    write_page(results, folder, plots)


def summarise_on(terminal: Terminal, results: Results, folder: Path) -> None:
    for table in all_tables(results):
        terminal.table(table)
    if results.invalid:
        terminal.table(invalid_table(results))
    for note in notes(results):
        terminal.say(f"! {note}")
    terminal.say(verdict_line(results))
    actual = results.predictions.get("actual_total_s")
    if actual is not None:
        predicted = results.predictions["predicted_total_s"]
        terminal.say(f"predicted {duration(predicted)}, took {duration(actual)}")
    terminal.say(f"results and report: {folder}")


def _unfinished(config: MatrixConfig, folder: Path) -> Results | None:
    if not (folder / FILE_NAME).exists():
        return None
    results = Results.read(folder)
    if replace(results.config, max_time_s=config.max_time_s) != config:
        raise ConfigError(f"--resume: {folder} holds a run with other options; repeat its options or choose another")
    results.config = config
    results.forget_unfinished()
    return results
