"""The evaluation of KV as a table, a picture and numbers for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from warmkv_evaluation.kv import Estimate, Quality

HEAD = (
    "| context | --kv | bits a value | change of perplexity | KL divergence, nats | its median | its 99% | same greedy "
    "token | facts recalled |",
    "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
)


def row(quality: Quality) -> str:
    """A line of the table."""
    recalled = "" if quality.recalled is None else f"{quality.recalled:.0%} of {quality.right_unquantised}"
    cells = [
        f"{quality.context:,}",
        quality.kv,
        f"{quality.bits:.2f}",
        _interval(quality.change, "{:+.2%}"),
        _interval(quality.divergence, "{:.4f}"),
        f"{quality.median_divergence:.4f}",
        f"{quality.p99_divergence:.4f}",
        _interval(quality.agreement, "{:.1%}"),
        recalled,
    ]
    return f"| {' | '.join(cells)} |"


def write(model: str, results: Sequence[Quality], folder: Path) -> None:
    """`kv.json`, `kv.md` and `kv.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"model": model, "results": [asdict(each) for each in results]}
    (folder / "kv.json").write_text(json.dumps(told, indent=1) + "\n")
    (folder / "kv.md").write_text("\n".join([*HEAD, *map(row, results)]) + "\n")
    draw(model, results, folder / "kv.png")


def draw(model: str, results: Sequence[Quality], path: Path) -> None:
    """Divergence over bits a value, for each context length."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for context in dict.fromkeys(each.context for each in results):
            those = sorted((each for each in results if each.context == context), key=lambda each: each.bits)
            values = [each.divergence.value for each in those]
            error = [
                [max(0.0, each.divergence.value - each.divergence.low) for each in those],
                [max(0.0, each.divergence.high - each.divergence.value) for each in those],
            ]
            bits = [each.bits for each in those]
            axes.errorbar(bits, values, error, fmt="o", capsize=2, label=f"{context:,} tokens of context")
        for kv in dict.fromkeys(each.kv for each in results):
            highest = max((each for each in results if each.kv == kv), key=lambda each: each.divergence.high)
            axes.annotate(kv, (highest.bits, highest.divergence.high), (0, 4), textcoords="offset points", ha="center")
        axes.margins(x=0.12)
        axes.set_yscale("log")
        axes.set_xlabel("bits a value, all in")
        axes.set_ylabel("KL divergence from unquantised KV, nats")
        axes.set_title(model)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def _interval(estimate: Estimate, style: str) -> str:
    value, low, high = (style.format(each) for each in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
