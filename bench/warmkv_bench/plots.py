"""The plots of a report, as SVG files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from warmkv_bench.config import Mode, State
from warmkv_bench.plan import Purpose
from warmkv_bench.results import Results, Sample

# Told apart by people who see colours differently, too (Okabe and Ito).
COLORS = {
    State.COLD: "#0072b2",
    State.WARM: "#e69f00",
    State.WARM_DROPPED: "#d55e00",
    State.HOT: "#cc3311",
    State.RESTART: "#009e73",
}
STAGES = ("queue", "load", "prefill", "decode", "commit")
STAGE_COLORS = ("#999999", "#e69f00", "#0072b2", "#56b4e9", "#009e73")


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Draws every plot that has something to show; returns the files, in the order of a report."""
    drawings: list[tuple[str, Callable[[Results, Figure], bool]]] = [
        ("ttft.svg", _ttft),
        ("stages.svg", _stages),
        ("throughput.svg", _throughput),
        ("memory.svg", _memory),
        ("run-time.svg", _run_time),
    ]
    written: list[Path] = []
    for name, draw in drawings:
        with _style():
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            if draw(results, figure):
                # Without a date the same results give the same file.
                figure.savefig(folder / name, metadata={"Date": None})
                written.append(folder / name)
    return written


def _ttft(results: Results, figure: Figure) -> bool:
    samples = [sample for sample in _matrix(results) if sample.batch_size == 1 and sample.ttft_ms is not None]
    if not samples:
        return False
    axes = figure.subplots()
    for state in State:
        points = [(sample.prefix_tokens, sample.ttft_ms or 0.0) for sample in samples if sample.state == state]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, color=COLORS[state], s=14, alpha=0.6, linewidths=0)
        medians = sorted(
            (group["prefix_tokens"], group["metrics"]["ttft_ms"]["median"])
            for group in results.summary["groups"]
            if group["state"] == state
            and group["batch_size"] == 1
            and group["purpose"] == Purpose.MATRIX
            and group["metrics"]["ttft_ms"]
        )
        axes.plot(*zip(*medians, strict=True), color=COLORS[state], label=state)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({sample.prefix_tokens for sample in samples})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    _label(axes, "Time to first token, every sample", "prefix, tokens", "ms")
    axes.legend()
    return True


def _stages(results: Results, figure: Figure) -> bool:
    groups = [
        group
        for group in results.summary["groups"]
        if group["purpose"] == Purpose.MATRIX
        and group["mode"] == Mode.STREAMING
        and group["batch_size"] == 1
        and group["state"] != State.COLD
        and group["metrics"]["server_load_ms"]
    ]
    if not groups:
        return False
    axes = figure.subplots()
    groups.sort(key=lambda group: (group["context_tokens"], group["state"]))
    names = [f"{group['context_tokens']:,} {group['state']}" for group in groups]
    left = [0.0] * len(groups)
    for stage, color in zip(STAGES, STAGE_COLORS, strict=True):
        widths = [group["metrics"][f"server_{stage}_ms"]["median"] for group in groups]
        axes.barh(names, widths, left=left, label=stage, color=color)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    _label(axes, "Stages inside the server (cold is left out: its prefill would hide the rest)", "ms", "")
    axes.legend()
    return True


def _throughput(results: Results, figure: Figure) -> bool:
    groups = [
        group
        for group in results.summary["groups"]
        if group["mode"] == Mode.STREAMING and group["state"] == State.HOT and group["metrics"]["batch_tokens_per_s"]
    ]
    sizes = sorted({group["batch_size"] for group in groups})
    if len(sizes) < 2:
        return False
    axes = figure.subplots()
    for context in sorted({group["context_tokens"] for group in groups}):
        points = sorted(
            (group["batch_size"], group["metrics"]["batch_tokens_per_s"]["median"])
            for group in groups
            if group["context_tokens"] == context
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{context:,} tokens")
    axes.set_xticks(sizes)
    _label(axes, "Throughput of hot requests released together", "requests", "tokens/s")
    axes.legend()
    return True


def _memory(results: Results, figure: Figure) -> bool:
    rows = {row["tokens"]: row for row in results.memory}
    if not rows:
        return False
    axes = figure.subplots()
    sizes = sorted(rows)
    for column, label, marker in (
        ("fp16_bytes", "fp16, computed", "s"),
        ("formula_bytes", "quantised, computed", "^"),
        ("hot_bytes", "RAM", "o"),
        ("warm_bytes", "disk", "x"),
    ):
        axes.plot(sizes, [rows[size][column] / 2**20 for size in sizes], marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    _label(axes, "Bytes of one agent", "tokens", "MiB")
    axes.legend()
    return True


def _run_time(results: Results, figure: Figure) -> bool:
    rows = [row for row in results.predictions.get("contexts", []) if row["actual_s"] is not None]
    if not rows:
        return False
    axes = figure.subplots()
    names = [f"{row['context_tokens']:,}" for row in rows]
    positions = range(len(rows))
    for offset, column, label in ((-0.2, "at_start_s", "predicted at the start"), (0.2, "actual_s", "actual")):
        axes.bar([position + offset for position in positions], [row[column] for row in rows], 0.4, label=label)
    axes.set_xticks(list(positions), names)
    _label(axes, "Run time", "context, tokens", "s")
    axes.legend()
    return True


def _matrix(results: Results) -> list[Sample]:
    return [sample for sample in results.samples if sample.verified and sample.purpose == Purpose.MATRIX]


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="major", alpha=0.3)


@contextmanager
def _style() -> Iterator[None]:
    # Text as text, and ids that don't change from one drawing to the next.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "warmkv", "axes.spines.top": False}):
        yield
