"""Two runs side by side: which groups became slower, and whether the samples can say so."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from warmkv_bench.results import Results
from warmkv_bench.stats import Ratio, Verdict, unpaired_ratio, verdict
from warmkv_bench.summary import GroupKey, group_key, latency_ms
from warmkv_bench.tables import Table

MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Change:
    """One group of samples in both runs. `ratio` is new by old: above 1 is slower. None where either has no samples."""

    key: GroupKey
    old_ms: float | None
    new_ms: float | None
    ratio: Ratio | None
    verdict: str

    @property
    def regressed(self) -> bool:
        """Slower beyond the tolerance, or no longer there."""
        return self.verdict in (Verdict.SLOWER, MISSING)


def changes(old: Results, new: Results, tolerance: float) -> list[Change]:
    """Compares the latencies (TTFT, or E2E of final answers) of every group of the old run with the new run's.

    With fewer than 5 samples on a side there is no interval; a group then counts as slower only if its fastest new
    sample is slower than the slowest old one by more than the tolerance.
    """
    before, after = _latencies(old), _latencies(new)
    found: list[Change] = []
    for key, old_samples in before.items():
        new_samples = after.get(key, [])
        ratio = unpaired_ratio(new_samples, old_samples)
        if ratio is None:
            found.append(Change(key, _median(old_samples), None, None, MISSING))
            continue
        said: str = verdict(ratio, tolerance)
        if said == Verdict.TOO_FEW and min(new_samples) > max(old_samples) * (1 + tolerance):
            said = Verdict.SLOWER
        elif said == Verdict.TOO_FEW and max(new_samples) * (1 + tolerance) < min(old_samples):
            said = Verdict.FASTER
        found.append(Change(key, _median(old_samples), _median(new_samples), ratio, said))
    return found


def differences(old: Results, new: Results) -> list[str]:
    """What else than the code differs between the runs, so that a reader doesn't take it for a change of speed."""
    found: list[str] = []
    for part, fact in (
        ("machine", "processor"),
        ("machine", "cores"),
        ("machine", "data_filesystem"),
        ("server", "device"),
        ("server", "blas"),
        ("server", "fingerprint"),
        ("server", "durability"),
    ):
        one, other = old.environment[part][fact], new.environment[part][fact]
        if one != other:
            found.append(f"{part} {fact}: {one} before, {other} now")
    for option in ("output_tokens", "suffix_tokens"):
        one, other = getattr(old.config, option), getattr(new.config, option)
        if one != other:
            found.append(f"{option}: {one} before, {other} now")
    return found


def changes_table(found: list[Change]) -> Table:
    rows = []
    for change in found:
        purpose, context, mode, batch, state, page_cache, isolation = change.key
        ratio, interval = "-", "-"
        if change.ratio is not None:
            ratio = f"{change.ratio.ratio:.2f}"
            if change.ratio.ci95 is not None:
                interval = f"{change.ratio.ci95[0]:.2f} to {change.ratio.ci95[1]:.2f}"
        where = " ".join(filter(None, (state, page_cache, purpose if purpose != "matrix" else "", isolation)))
        cells = (where, mode, f"{context:,}", str(batch), _shown(change.old_ms), _shown(change.new_ms), ratio, interval)
        rows.append((*cells, change.verdict))
    columns = ("State", "Mode", "Context", "Batch", "old ms", "new ms", "new / old", "95% interval", "verdict")
    return Table("Latency, new against old", columns, rows, labels=2)


def _latencies(results: Results) -> dict[GroupKey, list[float]]:
    found: dict[GroupKey, list[float]] = defaultdict(list)
    for sample in results.samples:
        latency = latency_ms(sample)
        if sample.verified and latency is not None:
            found[group_key(sample)].append(latency)
    return found


def _median(samples: list[float]) -> float:
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
