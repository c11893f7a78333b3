"""report.md: what was measured, where, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warmkv_bench.environment import model_note
from warmkv_bench.results import Results
from warmkv_bench.tables import Table, all_tables, invalid_table, size

# Runnable processes for each core, of others than the benchmark, from which on timings are not what they could be.
BUSY = 0.5

METHOD = """\
Time to first token runs from just before the call, on a connected channel, to the first delta. ITL is the median gap \
between tokens, TPOT the mean gap, E2E ends with `finished`, which the server sends after the commit. Every request \
has the same prefix, the same new suffix and the same output length in every state of a repetition, and each sample \
was checked against the reply's cache report and the server's counters. Brackets hold a bootstrap 95% interval, from \
5 samples on; parentheses hold the least and the most; a number alone is a single sample."""


def markdown(results: Results, plots: Sequence[str]) -> str:
    """The report, with links to plots beside it."""
    parts = [f"# WarmKV benchmark, {results.environment['time']}", verdict_line(results)]
    parts += notes(results)
    if results.invalid:
        parts.append(markdown_table(invalid_table(results)))
    for table in all_tables(results):
        parts.append(markdown_table(table))
    parts += [f"![{name}]({name})" for name in plots]
    parts += ["## Method", METHOD, markdown_table(environment_table(results))]
    return "\n\n".join(parts) + "\n"


def write_markdown(results: Results, folder: Path, plots: Sequence[str]) -> None:
    (folder / "report.md").write_text(markdown(results, plots))


def notes(results: Results) -> list[str]:
    """What a reader should know before any number."""
    found = [*filter(None, [model_note(results.environment)]), *results.problems]
    machine = results.environment["machine"]
    if machine["load_average"][0] > BUSY * machine["cores"]:
        load = machine["load_average"][0]
        found.append(f"The machine was busy: load {load} on {machine['cores']} cores before the start.")
    return found


def verdict_line(results: Results) -> str:
    """One line on whether the run can be trusted."""
    summary = results.summary
    line = f"{summary['verified']} of {summary['samples']} samples verified; the run is {results.status}."
    error = results.predictions.get("error")
    if error is not None:
        line += f" Its time was predicted {abs(error):.0%} too {'high' if error > 0 else 'low'}."
    return line


def markdown_table(table: Table) -> str:
    """A table with its title as a heading; numbers are aligned to the right."""
    rule = ["---" if index < table.labels else "---:" for index in range(len(table.columns))]
    lines = [table.columns, rule, *table.rows]
    shown = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]
    return "\n".join([f"## {table.title}", "", *shown])


def environment_table(results: Results) -> Table:
    """Machine, server and model."""
    machine, client, server = (results.environment[part] for part in ("machine", "client", "server"))
    config = results.config
    facts: list[tuple[str, Any]] = [
        ("Machine", f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])}"),
        ("System", machine["system"]),
        ("Load average at the start", ", ".join(map(str, machine["load_average"]))),
        ("File system of the data", machine["data_filesystem"] or "unknown"),
        ("Device", " ".join(filter(None, (server["device"], server["blas"])))),
        ("Model", f"{server['model_id']}, weights {server['weights_digest'][:16]}"),
        ("KV", f"{server['kv_bits']} bits, groups of {server['kv_group_size']}"),
        ("Durability", server["durability"].removeprefix("DURABILITY_").lower()),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(server["versions"].items()))),
        ("Commit", client["commit"] or "unknown"),
        ("Suffix and output", f"{config.suffix_tokens} and {config.output_tokens} tokens"),
        ("Isolation, seed", f"{config.isolation}, {config.seed}"),
    ]
    return Table("Where", ("", ""), [(name, str(value)) for name, value in facts], labels=2)
