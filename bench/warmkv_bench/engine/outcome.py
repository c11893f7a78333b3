"""What two sets of samples say about a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np

from warmkv_bench.stats import BOOTSTRAP_SEED, LEAST_FOR_INTERVAL, paired_ratio
from warmkv_bench.tables import Table

RESAMPLES = 2000
STALLS_QUANTILE = 99


class Verdict(StrEnum):
    """UNCLEAR: the interval has the target inside; the median says which side is likelier. NONE: nothing was asked."""

    HOLDS = "holds"
    LIKELY = "holds by the median"
    UNLIKELY = "fails by the median"
    FAILS = "fails"
    NONE = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a ratio, ours by theirs.

    Attributes:
        bound: the ratio asked for.
        at_least: whether more is better (tokens/s), instead of less (times).
        slack_ms: milliseconds that ours may take on top.
    """

    bound: float
    at_least: bool = False
    slack_ms: float = 0.0

    def __str__(self) -> str:
        slack = f" + {self.slack_ms:g} ms" if self.slack_ms else ""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{slack}"

    def verdict(self, ratio: float, interval: tuple[float, float] | None) -> Verdict:
        """Judges a ratio from which the slack was taken off already."""
        sign = -1 if self.at_least else 1
        inside = sign * ratio <= sign * self.bound
        if interval is None:
            return Verdict.LIKELY if inside else Verdict.UNLIKELY
        within = [sign * edge <= sign * self.bound for edge in interval]
        if all(within):
            return Verdict.HOLDS
        if not any(within):
            return Verdict.FAILS
        return Verdict.LIKELY if inside else Verdict.UNLIKELY


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired samples of WarmKV and of what it is measured against.

    Attributes:
        name: of the comparison, such as "hot".
        model, case: what was run, such as "1,024 + 32 tokens".
        unit: of the samples, "ms" or "tokens/s".
        ours: WarmKV's samples; `theirs` has those of `against`, one for each.
        target: None where the figure only stands beside others.
    """

    name: str
    model: str
    case: str
    unit: str
    against: str
    ours: list[float]
    theirs: list[float]
    target: Target | None = None

    def outcome(self) -> dict[str, Any]:
        """Medians, ratio with its 95% interval, and verdict; the ratio is of medians, slack taken off ours."""
        slack = self.target.slack_ms if self.target is not None else 0.0
        ratio = paired_ratio([max(value - slack, 1e-9) for value in self.ours], self.theirs)
        plain = paired_ratio(self.ours, self.theirs)
        assert ratio is not None
        assert plain is not None
        verdict = Verdict.NONE if self.target is None else self.target.verdict(ratio.ratio, ratio.ci95)
        return {
            "comparison": self.name,
            "model": self.model,
            "case": self.case,
            "against": self.against,
            "unit": self.unit,
            "n": ratio.n,
            "ours": float(np.median(self.ours)),
            "theirs": float(np.median(self.theirs)),
            "ratio": plain.ratio,
            "ci95": plain.ci95,
            "target": str(self.target) if self.target is not None else None,
            "verdict": str(verdict),
        }


def total_rate(streams: Sequence[Sequence[float]]) -> float:
    """Tokens a second of all streams together, while all of them run.

    Args:
        streams: when each stream's tokens came, in milliseconds on one clock.

    Raises:
        ValueError: at no time did all of them run.
    """
    start, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    if end <= start:
        raise ValueError("the streams were never all running at once: ask for longer answers")
    return sum(sum(start < moment <= end for moment in times) for times in streams) / (end - start) * 1e3


def alternating_rate(groups: Sequence[tuple[int, float]]) -> float:
    """Tokens a second of groups that take turns, a step each: (streams, tokens/s alone) of every group."""
    return sum(streams for streams, _ in groups) / sum(streams / rate for streams, rate in groups)


def fair_share(solo_ms: float, requests: int) -> float:
    """When the median of equal requests is answered if they are served one after another, each as fast as alone."""
    return solo_ms * (requests + 1) / 2


def gaps_after(streams: Sequence[Sequence[float]], start: float, end: float) -> list[tuple[float, float]]:
    """(when, how long) of every gap between two tokens of a stream that overlaps [start, end]; milliseconds."""
    return [
        (late, late - early) for times in streams for early, late in pairwise(times) if late > start and early < end
    ]


def p99_outcome(model: str, case: str, gaps: Sequence[float], limit_ms: float) -> dict[str, Any]:
    """The gaps' 99th percentile by the limit, with a bootstrap interval, as a row beside the other comparisons'."""
    values = np.asarray(gaps, dtype=np.float64)
    found = float(np.percentile(values, STALLS_QUANTILE))
    interval = None
    if len(values) >= LEAST_FOR_INTERVAL:
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        drawn = [np.percentile(rng.choice(values, len(values)), STALLS_QUANTILE) for _ in range(RESAMPLES)]
        low, high = np.percentile(drawn, (2.5, 97.5))
        interval = (float(low) / limit_ms, float(high) / limit_ms)
    target = Target(1.0)
    return {
        "comparison": "gap",
        "model": model,
        "case": case,
        "against": "max_decode_gap_ms + one step",
        "unit": "ms, p99",
        "n": len(values),
        "ours": found,
        "theirs": limit_ms,
        "ratio": found / limit_ms,
        "ci95": interval,
        "target": str(target),
        "verdict": str(target.verdict(found / limit_ms, interval)),
    }


def outcomes_table(outcomes: Sequence[dict[str, Any]]) -> Table:
    """A row for each comparison."""
    rows = [
        (
            row["comparison"],
            row["model"],
            row["case"],
            row["against"],
            f"{row['ours']:.1f}",
            f"{row['theirs']:.1f}",
            row["unit"],
            f"{row['ratio']:.2f}",
            "-" if row["ci95"] is None else f"{row['ci95'][0]:.2f} to {row['ci95'][1]:.2f}",
            str(row["n"]),
            row["target"] or "",
            row["verdict"],
        )
        for row in outcomes
    ]
    columns = ("", "Model", "Case", "Against", "WarmKV", "other", "unit", "ratio", "95%", "n", "target", "verdict")
    return Table("The engine beside mlx-lm", columns, rows, labels=4)
