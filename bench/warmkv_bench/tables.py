"""The tables of a report: rows of text, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from warmkv_bench.config import Isolation, Mode, State
from warmkv_bench.plan import Purpose
from warmkv_bench.results import Results

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a title; the first `labels` columns are text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    labels: int = 1


def latency_tables(results: Results) -> list[Table]:
    """Time to first token, and time to the whole answer, by context and state."""
    tables = [
        _by_state(results, Mode.STREAMING, "ttft_ms", "Time to first token, ms"),
        _by_state(results, Mode.FINAL, "e2e_ms", "Time to the whole answer in one message, ms"),
    ]
    return [table for table in tables if table.rows]


def decoding_table(results: Results) -> Table:
    """Gaps between tokens and throughput of streamed answers."""
    rows = [
        (
            _context(group),
            _state(group),
            str(group["batch_size"]),
            _median(group, "itl_ms"),
            _median(group, "tpot_ms"),
            _median(group, "e2e_ms"),
            _median(group, "tokens_per_s"),
            _median(group, "batch_tokens_per_s"),
        )
        for group in _groups(results, Mode.STREAMING)
    ]
    columns = ("Context", "State", "Batch", "ITL ms", "TPOT ms", "E2E ms", "tokens/s", "tokens/s of the batch")
    return Table("Decoding", columns, rows, labels=2)


def stages_table(results: Results) -> Table:
    """The server's own account of where the time went."""
    stages = ("queue", "load", "prefill", "first_token", "decode", "commit")
    rows = [
        (
            _context(group),
            _state(group),
            str(group["batch_size"]),
            *(_median(group, f"server_{stage}_ms") for stage in stages),
            _bytes(group["metrics"]["bytes_loaded"]),
        )
        for group in _groups(results, Mode.STREAMING)
    ]
    columns = ("Context", "State", "Batch", *(f"{stage.replace('_', ' ')} ms" for stage in stages), "read")
    return Table("Stages inside the server", columns, rows, labels=2)


def ratios_table(results: Results) -> Table:
    """How many times one state is faster than another."""
    rows = [
        (
            f"{ratio['context_tokens']:,}",
            f"{ratio['numerator']} / {ratio['denominator']}",
            ratio["mode"],
            str(ratio["batch_size"]),
            f"{ratio['ratio']:.2f}",
            _interval(ratio["ci95"]),
            str(ratio["n"]),
        )
        for ratio in results.summary["ratios"]
    ]
    columns = ("Context", "Ratio", "Mode", "Batch", "of medians", "95% interval", "pairs")
    return Table("Ratios of latencies", columns, rows, labels=3)


def answers_table(results: Results) -> Table:
    """Agreement of the answers with the hot one."""
    rows = [
        (
            f"{row['context_tokens']:,}",
            row["state"],
            str(row["batch_size"]),
            f"{row['equal']} of {row['compared']}",
            f"{row['median_leading_agreement']:.0%}",
        )
        for row in results.summary["answers"]
    ]
    columns = ("Context", "State", "Batch", "equal to hot", "tokens before the first difference")
    return Table("Answers", columns, rows, labels=2)


def memory_table(results: Results) -> Table:
    """Bytes of an agent, measured and computed."""
    rows: list[tuple[str, ...]] = []
    seen: set[int] = set()
    for row in results.memory:
        if row["tokens"] in seen:
            continue
        seen.add(row["tokens"])
        rows.append(
            (
                f"{row['tokens']:,}",
                size(row["hot_bytes"]),
                size(row["warm_bytes"]),
                size(row["formula_bytes"]),
                size(row["reported_formula_bytes"]),
                size(row["fp16_bytes"]),
                f"{row['fp16_bytes'] / row['warm_bytes']:.2f}" if row["warm_bytes"] else NOTHING,
                size(row["process_bytes"]),
            )
        )
    columns = ("Tokens", "RAM", "disk", "formula", "bytes/token x tokens", "fp16", "fp16 / disk", "server process")
    return Table("Memory of one agent", columns, rows)


def prediction_table(results: Results) -> Table:
    """Predicted against actual time."""
    predictions = results.predictions
    rows = [
        (
            f"{row['context_tokens']:,}",
            _seconds(row["at_start_s"]),
            _seconds(row["refitted_s"]),
            _seconds(row["actual_s"]),
        )
        for row in predictions.get("contexts", [])
    ]
    if rows:
        actual = predictions["actual_total_s"]
        rows.append(("all", _seconds(predictions["predicted_total_s"]), NOTHING, _seconds(actual)))
    return Table("Run time, s", ("Context", "predicted at the start", "predicted before it", "actual"), rows)


def cross_check_table(results: Results) -> Table:
    """Fork isolation against strict isolation."""
    rows = [
        (
            row["state"],
            f"{row['fork_ttft_ms']['median']:.1f}",
            f"{row['strict_ttft_ms']['median']:.1f}",
            f"{row['ratio']:.2f}",
            _interval(row["ci95"]),
            row["verdict"],
        )
        for row in results.summary["cross_check"]
    ]
    columns = ("State", "fork ms", "strict ms", "fork / strict", "95% interval", "verdict")
    return Table("Fork against strict isolation, time to first token", columns, rows)


def invalid_table(results: Results) -> Table:
    """Samples that count for nothing, and why."""
    rows = [
        (
            f"{sample.context_tokens:,}",
            sample.state,
            sample.mode,
            f"batch {sample.batch_size}, run {sample.run}, {sample.isolation}",
            sample.invalid_reason or "",
        )
        for sample in results.invalid
    ]
    return Table("Invalid samples", ("Context", "State", "Mode", "Where", "Why"), rows, labels=5)


def all_tables(results: Results) -> list[Table]:
    """Every table that has rows, in the order of a report."""
    tables = [
        *latency_tables(results),
        ratios_table(results),
        decoding_table(results),
        stages_table(results),
        answers_table(results),
        memory_table(results),
        cross_check_table(results),
        prediction_table(results),
    ]
    return [table for table in tables if table.rows]


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _by_state(results: Results, mode: Mode, metric: str, title: str) -> Table:
    cells: dict[tuple[int, int, str], dict[str, str]] = {}
    states: list[str] = []
    for group in _groups(results, mode):
        where = (group["context_tokens"], group["batch_size"], group["isolation"])
        state = _state(group)
        if state not in states:
            states.append(state)
        cells.setdefault(where, {})[state] = _with_range(group["metrics"][metric], group["invalid"])
    order = [str(state) for state in State]
    states.sort(key=lambda state: order.index(state.split(" ")[0]))
    rows = [
        (f"{context:,}", str(batch), *(found.get(state, NOTHING) for state in states))
        for (context, batch, _), found in sorted(cells.items())
    ]
    return Table(title, ("Context", "Batch", *states), rows)


def _groups(results: Results, mode: Mode) -> list[dict[str, Any]]:
    """Groups of the matrix and of concurrent pairs, without the cross-check's."""
    found: Iterable[dict[str, Any]] = results.summary["groups"]
    order = [str(state) for state in State]
    return sorted(
        (group for group in found if group["mode"] == mode and group["purpose"] != Purpose.CROSS_CHECK),
        key=lambda g: (g["context_tokens"], g["batch_size"], order.index(g["state"])),
    )


def _context(group: dict[str, Any]) -> str:
    return f"{group['context_tokens']:,}"


def _state(group: dict[str, Any]) -> str:
    """The state, with what has to be told apart from it."""
    state = str(group["state"])
    if group["page_cache"] == "not controlled":
        state += " (page cache not controlled)"
    if group["isolation"] == Isolation.STRICT:
        state += " (strict)"
    return state


def _with_range(estimate: dict[str, Any] | None, invalid: int) -> str:
    failed = f"{invalid} invalid" if invalid else ""
    if estimate is None:
        return failed or NOTHING
    shown = f"{estimate['median']:.1f}"
    if estimate["ci95"]:
        shown += f" [{estimate['ci95'][0]:.1f}, {estimate['ci95'][1]:.1f}]"
    elif estimate["n"] > 1:
        shown += f" ({estimate['least']:.1f}-{estimate['most']:.1f})"
    return f"{shown}, {failed}" if failed else shown


def _median(group: dict[str, Any], metric: str) -> str:
    estimate = group["metrics"][metric]
    return NOTHING if estimate is None else f"{estimate['median']:.1f}"


def _bytes(estimate: dict[str, Any] | None) -> str:
    return NOTHING if estimate is None else size(estimate["median"])


def _interval(ci95: list[float] | tuple[float, float] | None) -> str:
    return NOTHING if ci95 is None else f"{ci95[0]:.2f} to {ci95[1]:.2f}"


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"
