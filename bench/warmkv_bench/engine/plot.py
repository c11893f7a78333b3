"""The plot of the gaps between tokens while another context is prefilled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

STREAM_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc3311")


def draw_gaps(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each run: every gap of every stream, the prefill's time shaded, the bound as a line."""
    # Text as text, and neither a date nor random ids: the same results give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "warmkv", "axes.spines.top": False}):
        figure = Figure(figsize=(8, 3.6 * len(runs)), layout="constrained")
        for axes, run in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs, strict=True):
            for number, gaps in enumerate(run["gaps"]):
                when = [moment / 1e3 for moment, _ in gaps]
                lengths = [length for _, length in gaps]
                color = STREAM_COLORS[number % len(STREAM_COLORS)]
                axes.plot(when, lengths, ".", markersize=2, color=color, label=f"stream {number + 1}", rasterized=True)
            axes.axvspan(run["start_ms"] / 1e3, run["end_ms"] / 1e3, color="#999999", alpha=0.15, label="prefill")
            axes.axhline(run["limit_ms"], color="black", linewidth=1, label="max_decode_gap_ms + one step")
            axes.set_title(f"{run['model']}: {run['case']}", fontsize=11)
            axes.set_xlabel("s")
            axes.set_ylabel("gap between two tokens, ms")
            axes.set_ylim(bottom=0)
            axes.grid(visible=True, alpha=0.3)
            axes.legend(loc="upper left", fontsize=8, markerscale=4)
        figure.savefig(path, metadata={"Date": None})
