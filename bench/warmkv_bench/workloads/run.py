"""Runs a workload on a server, and writes what it came to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from warmkv_bench.environment import environment, model_note
from warmkv_bench.options import ServerChoice
from warmkv_bench.prompts import Prompts
from warmkv_bench.report import markdown_table
from warmkv_bench.tables import Table, size
from warmkv_bench.target import Target
from warmkv_bench.terminal import Terminal
from warmkv_bench.workloads.turns import Driver, Figures, WorkloadResult, summarise

REQUEST_TIMEOUT_S = 3600.0


class Workload(Protocol):
    """A workload: a dataclass of its parameters that can be run."""

    async def run(self, driver: Driver, prompts: Prompts) -> Figures:
        """Sets up, calls `driver.start`, sends the requests; returns the answers to the workload's question."""
        ...


async def run_workload(
    name: str,
    workload: Workload,
    parameters: dict[str, Any],
    target: Target,
    server: ServerChoice,
    seed: int,
) -> WorkloadResult:
    """Runs a workload on a connected server that nobody else is using, and deletes its agents at the end."""
    client = target.client
    info = await client.info()
    where = environment(info, target.data_dir, server.arguments)
    await client.delete_leftovers()
    prompts = await Prompts.of_server(client, seed)
    driver = Driver(client)
    try:
        figures = await workload.run(driver, prompts)
        problems = await driver.finish()
    finally:
        await client.delete_leftovers()
    return WorkloadResult(name, parameters, where, driver.turns, driver.seconds, figures, problems)


def write(result: WorkloadResult, folder: Path) -> None:
    """Writes workload.json and report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "workload.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
    parts = [f"# Workload {result.name}, {result.environment['time']}", *(f"- {note}" for note in notes(result))]
    parts += [markdown_table(table) for table in tables(result)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def show(result: WorkloadResult, terminal: Terminal, folder: Path) -> None:
    for table in tables(result):
        terminal.table(table)
    for note in notes(result):
        terminal.say(f"! {note}")
    terminal.say(f"results and report: {folder}")


def notes(result: WorkloadResult) -> list[str]:
    """What a reader should know before any number."""
    return [*filter(None, [model_note(result.environment)]), *result.problems]


def tables(result: WorkloadResult) -> list[Table]:
    """The answers, the latencies by phase and source, and the parameters."""
    figures = [(name.replace("_", " "), _shown(name, value)) for name, value in result.figures.items()]
    parameters = [(name, str(value)) for name, value in result.parameters.items()]
    whole = summarise(result.turns, result.seconds)
    overall = [
        ("requests", f"{whole['requests']}, {whole['failed']} failed"),
        ("hit ratio, tokens", _shown("hit_ratio", whole["hit_ratio"])),
        ("tokens/s", _shown("", whole["tokens_per_s"])),
        ("ITL median ms", _shown("", whole["itl_ms"] and whole["itl_ms"]["median"])),
    ]
    return [
        Table("Answers", ("", ""), figures),
        _latencies(result),
        Table("Overall", ("", ""), overall),
        Table("Parameters", ("", ""), parameters),
    ]


def _latencies(result: WorkloadResult) -> Table:
    rows = []
    for phase in dict.fromkeys(turn.phase for turn in result.turns):
        of_phase = [turn for turn in result.turns if turn.phase == phase]
        for source in dict.fromkeys(turn.source for turn in of_phase if turn.source is not None):
            turns = [turn for turn in of_phase if turn.source == source]
            found = summarise(turns, 0.0)
            latency, gaps = found["latency_ms"], found["itl_ms"]
            cells = (f"{latency['median']:.1f}", f"{latency['most']:.1f}") if latency else ("-", "-")
            longest = f"{gaps['most']:.1f}" if gaps else "-"
            rows.append((phase, source, str(len(turns)), *cells, longest))
    columns = ("Phase", "Source", "requests", "latency ms", "longest ms", "longest gap between tokens ms")
    return Table("Time to first token, from when each request was due", columns, rows, labels=2)


def _shown(name: str, value: float | int | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if name.startswith("disk_bytes"):
        return size(value)
    if "share" in name or "ratio" in name:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def parameters_of(workload: Any, seed: int) -> dict[str, Any]:
    """The fields of a workload, for its results."""
    return {**asdict(workload), "seed": seed}
