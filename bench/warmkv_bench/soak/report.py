"""A soak's findings, as JSON and for people."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from warmkv_bench.environment import model_note
from warmkv_bench.report import markdown_table
from warmkv_bench.soak.run import Findings
from warmkv_bench.tables import Table, size

MOST_BREACHES = 50


def write(findings: Findings, folder: Path) -> None:
    """Writes soak.json and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.json").write_text(json.dumps(findings.to_json()) + "\n")
    soak, server = findings.soak, findings.environment["server"]
    machine = findings.environment["machine"]
    command = (
        f"warmkv bench soak --requests {soak.requests} --agents {soak.agents} --seconds {soak.seconds:g} "
        f"--concurrency {soak.concurrency} --seed {soak.seed}"
    )
    parts = [
        f"# Soak of {server['model_id']}, {findings.environment['time']}",
        f"    {command}",
        f"{machine['processor']}, {machine['cores']} cores; server: `{' '.join(server['arguments'] or [])}`.",
        *filter(None, [model_note(findings.environment)]),
        verdict(findings),
        *(f"- {breach}" for breach in findings.breaches[:MOST_BREACHES]),
        *(markdown_table(table) for table in tables(findings)),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def verdict(findings: Findings) -> str:
    total = sum(findings.counts.values())
    if findings.breaches:
        return f"**{len(findings.breaches)} breaches** in {total:,} requests."
    return f"{total:,} requests in {findings.seconds:.0f} seconds, and nothing was wrong."


def tables(findings: Findings) -> list[Table]:
    replays = findings.replays
    parted = [f"{margin:.4f}" for margin in sorted(replays.margins)]
    answers = [
        ("answers computed again, alone and from nothing", str(replays.count)),
        ("of them, equal to the last token", str(replays.equal)),
        ("tokens compared", f"{replays.tokens:,}"),
        ("margins where the others part", ", ".join(parted) or "-"),
        ("largest margin allowed", str(findings.soak.tolerance)),
    ]
    growth = "not known" if findings.growth is None else f"{findings.growth:+.1%}"
    memory = [*_memory(findings), ("growth after the warm-up", growth)]
    rest = [(name.replace("_", " "), str(value)) for name, value in findings.gauges.items()]
    return [
        Table("Requests", ("", ""), [(name, f"{count:,}") for name, count in sorted(findings.counts.items())]),
        Table("What they came to", ("", ""), [(k, f"{v:,}") for k, v in sorted(findings.outcomes.items())]),
        Table("What answers began from", ("", ""), [(k, f"{v:,}") for k, v in sorted(findings.sources.items())]),
        Table("Answers against running alone", ("", ""), answers),
        Table("Resident set of the server, medians", ("", ""), memory),
        Table("Gauges when every agent was deleted", ("", ""), rest),
    ]


def _memory(findings: Findings) -> list[tuple[str, str]]:
    if not findings.memory:
        return []
    end = findings.memory[-1][0]
    rows = []
    for tenth in range(10):
        start, stop = tenth * end / 10, (tenth + 1) * end / 10
        sizes = [nbytes for at, nbytes in findings.memory if start <= at <= stop]
        if sizes:
            rows.append((f"{start:.0f} to {stop:.0f} s", size(int(statistics.median(sizes)))))
    return rows
